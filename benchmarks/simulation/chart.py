"""The pictures of a simulation as SVG: targets kept over rate, and who did what over time. Pure functions."""

from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT, _LEFT, _TOP = 720, 260, 60, 40
_PALETTE = ("#8a8a8a", "#4878a8", "#7a68b0", "#5a9a5a", "#d08a3c", "#b05a7a")


def attainment_chart(title: str, curves: Mapping[str, Sequence[tuple[float, float]]], limit: float) -> str:
    """Shares by rate, one line per name, and the share that is asked for."""
    longest = max(rate for points in curves.values() for rate, _ in points)
    parts = [_axes(title, f"requests/s, to {longest:.3g}", "1")]
    parts.append(_line([(0.0, limit), (1.0, limit)], "#c04040", "4 3"))
    for index, (name, points) in enumerate(curves.items()):
        colour = _PALETTE[index % len(_PALETTE)]
        parts.append(_line([(rate / longest, share) for rate, share in sorted(points)], colour))
        parts.append(_label(index, name, colour))
    return _svg(parts)


def curves_chart(title: str, what: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Values of at least 0 over ``what``, one line per name."""
    longest = max(x for points in curves.values() for x, _ in points)
    most = max(y for points in curves.values() for _, y in points)
    parts = [_axes(title, f"{what}, to {longest:.3g}", f"{most:.3g}")]
    for index, (name, points) in enumerate(curves.items()):
        colour = _PALETTE[index % len(_PALETTE)]
        parts.append(_line([(x / longest, y / most) for x, y in points], colour))
        parts.append(_label(index, name, colour))
    return _svg(parts)


def timeline_chart(title: str, timeline: Sequence[tuple[float, int, int]], end_s: float) -> str:
    """Instances that take prefills (blue) and decodes (orange), as steps over time."""
    most = max(max(prefills, decodes) for _, prefills, decodes in timeline)
    parts = [_axes(title, f"time, to {end_s:.0f} s", str(most))]
    for index, (name, colour) in enumerate((("prefill", "#4878a8"), ("decode", "#d08a3c"))):
        ends = [*(time for time, *_ in timeline[1:]), end_s]
        steps = [
            (moment / end_s, counts[index] / most)
            for (start, *counts), end in zip(timeline, ends, strict=True)
            for moment in (start, end)
        ]
        parts.append(_line(steps, colour))
        parts.append(_label(index, name, colour))
    return _svg(parts)


def page(charts: Sequence[str]) -> str:
    """One HTML file that needs nothing else."""
    return "<!doctype html><meta charset=utf-8><title>xllm-bench simulate</title>" + "".join(charts) + "\n"


def _line(points: Sequence[tuple[float, float]], colour: str, dashes: str = "") -> str:
    """points: shares of width and height."""
    way = " ".join(f"{_LEFT + _WIDTH * x:.1f},{_TOP + _HEIGHT * (1 - y):.1f}" for x, y in points)
    return f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"/>'


def _label(index: int, name: str, colour: str) -> str:
    return f'<text x="{_LEFT + _WIDTH + 12}" y="{_TOP + 14 + 18 * index}" fill="{colour}">{escape(name)}</text>'


def _axes(title: str, what: str, top: str) -> str:
    bottom = _TOP + _HEIGHT
    return (
        f'<text x="{_LEFT}" y="20" font-weight="bold">{escape(title)}</text>'
        f'<path d="M{_LEFT} {_TOP}V{bottom}H{_LEFT + _WIDTH}" fill="none" stroke="#444"/>'
        f'<text x="{_LEFT + _WIDTH}" y="{bottom + 18}" text-anchor="end">{escape(what)}</text>'
        f'<text x="{_LEFT - 6}" y="{_TOP + 10}" text-anchor="end">{top}</text>'
        f'<text x="{_LEFT - 6}" y="{bottom}" text-anchor="end">0</text>'
    )


def _svg(parts: Sequence[str]) -> str:
    width, height = _LEFT + _WIDTH + 240, _TOP + _HEIGHT + 30
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="13">{"".join(parts)}</svg>'
    )
