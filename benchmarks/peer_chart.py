"""How much faster ours is than each peer, as bars in one SVG picture. A pure function."""

from collections.abc import Mapping
from html import escape

_LABEL, _WIDTH, _ROW, _GAP = 230, 460, 16, 10
_TITLE, _LEGEND = 26, 24
_COLOURS = ("#d08a3c", "#4878a8", "#5a9a5a")


def ratio_picture(title: str, ratios: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """ratios: ours against a peer, by precision, case and peer; above 1 ours is faster."""
    parts, y = [], 0
    for precision, cases in ratios.items():
        if any(cases.values()):
            parts.append(f'<g transform="translate(0 {y})">')
            parts.append(
                f'<text x="8" y="17" font-size="14">{escape(title)}, {escape(precision)}: speed against</text>'
            )
            chart, height = _chart(cases)
            parts.append(f'<g transform="translate(0 {_TITLE})">{chart}</g></g>')
            y += _TITLE + height + _GAP
    size = f'width="{_LABEL + _WIDTH + 60}" height="{y}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
        f'<rect {size} fill="white"/>{"".join(parts)}</svg>\n'
    )


def _chart(cases: Mapping[str, Mapping[str, float]]) -> tuple[str, int]:
    """The bars of each case, one for each peer, and their height."""
    peers = list(dict.fromkeys(peer for against in cases.values() for peer in against))
    largest = max(1.0, *(ratio for against in cases.values() for ratio in against.values())) * 1.1
    parts, y = [], _LEGEND
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
    parts.append(f'<path d="M{line:.1f} {_LEGEND - 6}V{y}" stroke="#c04040" stroke-dasharray="4 3"/>')
    return "".join(parts), y
