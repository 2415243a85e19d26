"""How much faster ours is than each peer, as bars in one HTML file that needs nothing else. A pure function."""

from collections.abc import Mapping
from html import escape

_LABEL, _WIDTH, _ROW, _GAP = 230, 460, 16, 10
_COLOURS = ("#d08a3c", "#4878a8", "#5a9a5a")


def ratio_page(title: str, ratios: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """ratios: ours against a peer, by precision, case and peer; above 1 ours is faster."""
    charts = "".join(
        f"<h2>{escape(precision)}</h2>{_chart(cases)}" for precision, cases in ratios.items() if any(cases.values())
    )
    return (
        f"<!doctype html><meta charset=utf-8><title>xllm-bench peers</title>"
        f"<body style='font-family:sans-serif'><h1>{escape(title)}: speed against other engines</h1>"
        f"<p>Each at its best setting. Right of the line this engine is faster.</p>{charts}\n"
    )


def _chart(cases: Mapping[str, Mapping[str, float]]) -> str:
    peers = list(dict.fromkeys(peer for against in cases.values() for peer in against))
    largest = max(1.0, *(ratio for against in cases.values() for ratio in against.values())) * 1.1
    parts, y = [], 24
    for index, peer in enumerate(peers):
        x = _LABEL + index * 130
        colour = _COLOURS[index % len(_COLOURS)]
        parts.append(f'<rect x="{x}" y="2" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 15}" y="12">{escape(peer)}</text>')
    for case, against in cases.items():
        middle = y + len(against) * _ROW / 2 + 4
        parts.append(f'<text x="{_LABEL - 8}" y="{middle:.0f}" text-anchor="end">{escape(case)}</text>')
        for peer, ratio in against.items():
            colour = _COLOURS[peers.index(peer) % len(_COLOURS)]
            length = ratio / largest * _WIDTH
            parts.append(f'<rect x="{_LABEL}" y="{y}" width="{length:.1f}" height="{_ROW - 3}" fill="{colour}"/>')
            parts.append(f'<text x="{_LABEL + length + 5:.1f}" y="{y + _ROW - 5}">{ratio:.2f}x</text>')
            y += _ROW
        y += _GAP
    line = _LABEL + _WIDTH / largest
    parts.append(f'<path d="M{line:.1f} 18V{y}" stroke="#c04040" stroke-dasharray="4 3"/>')
    return f'<svg width="{_LABEL + _WIDTH + 60}" height="{y + 6}" font-size="12">{"".join(parts)}</svg>'
