"""The page in one piece: markup, style and scripts, nothing from elsewhere."""

from functools import cache
from importlib.resources import files

_PARTS = {"/* style */": ("dashboard.css",), "/* script */": ("charts.js", "strips.js", "dashboard.js")}

HEADERS = {
    "content-type": "text/html; charset=utf-8",
    "cache-control": "no-cache",
    # It asks this server for data and nobody for anything else.
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


@cache
def page() -> bytes:
    folder = files(__package__)
    text = (folder / "dashboard.html").read_text("utf-8")
    for mark, names in _PARTS.items():
        text = text.replace(mark, "\n".join((folder / name).read_text("utf-8") for name in names))
    return text.encode()
