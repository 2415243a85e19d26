"""The report's pictures as inline SVG: step sizes and buckets, a timeline, a memory map. Pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import log2

_WIDTH = 960
# Room for a unit, its stream and a share: "communication main  100%".
_LABEL = 180
_COLUMNS = 3
_PALETTE = ("#4878a8", "#d08a3c", "#5a9a5a", "#b05a7a", "#7a68b0", "#8a8a5a", "#4a9aa0", "#a85a48")


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Something that occupies ``lane`` from ``start`` to ``end``, seconds."""

    name: str
    lane: str
    start: float
    end: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """``size`` bytes at ``offset`` of the pool, alive from operator number ``first`` to ``last``."""

    name: str
    offset: int
    size: int
    first: int
    last: int


def histogram_chart(histogram: Mapping[int, float], buckets: Sequence[int]) -> str:
    """Share of steps by size (bars, sizes on a logarithmic axis) and the buckets (lines)."""
    height, base = 220, 180
    largest = max([*histogram, *buckets, 2])
    total = sum(histogram.values()) or 1.0
    # Neighbouring sizes share a bar, or late sizes would be a smear.
    shares: dict[int, float] = {}
    for tokens, weight in histogram.items():
        shares[round(8 * log2(tokens))] = shares.get(round(8 * log2(tokens)), 0.0) + weight / total
    top = max(shares.values(), default=1.0)

    def x(size: float) -> float:
        return 40 + (_WIDTH - 80) * log2(size) / log2(largest)

    parts = []
    for position, share in sorted(shares.items()):
        tall = (base - 30) * share / top
        size: float = 2 ** (position / 8)
        parts.append(
            f'<rect x="{x(size) - 4:.1f}" y="{base - tall:.1f}" width="8" height="{tall:.1f}" fill="#4878a8">'
            f"<title>about {size:.0f} tokens: {share:.1%} of steps</title></rect>"
        )
    for index, bucket in enumerate(buckets):
        parts.append(
            f'<line x1="{x(bucket):.1f}" x2="{x(bucket):.1f}" y1="20" y2="{base}" stroke="#d08a3c" stroke-width="1.5"/>'
            f'<text x="{x(bucket):.1f}" y="{base + 16 + 14 * (index % 2)}" text-anchor="middle">{bucket}</text>'
        )
    parts.append(f'<line x1="30" x2="{_WIDTH - 30}" y1="{base}" y2="{base}" stroke="#888"/>')
    return _svg(height, parts)


def timeline_chart(spans: Sequence[Span]) -> str:
    """One row per lane, in order of first use."""
    if not spans:
        return ""
    lanes = list(dict.fromkeys(span.lane for span in spans))
    names = list(dict.fromkeys(span.name for span in spans))
    end = max(span.end for span in spans)
    scale = (_WIDTH - _LABEL - 20) / end
    row = 30
    parts = []
    for index, lane in enumerate(lanes):
        busy = sum(span.end - span.start for span in spans if span.lane == lane)
        parts.append(
            f'<text x="4" y="{index * row + 20}">{escape(lane)}</text>'
            f'<text x="{_LABEL - 6}" y="{index * row + 20}" text-anchor="end" fill="#777">{busy / end:.0%}</text>'
        )
    for span in spans:
        width = max((span.end - span.start) * scale, 0.5)
        parts.append(
            f'<rect x="{_LABEL + span.start * scale:.2f}" y="{lanes.index(span.lane) * row + 6}" width="{width:.2f}"'
            f' height="{row - 10}" fill="{_PALETTE[names.index(span.name) % len(_PALETTE)]}">'
            f"<title>{escape(span.name)}: {span.start * 1e6:.1f} to {span.end * 1e6:.1f} us</title></rect>"
        )
    y = len(lanes) * row + 16
    parts.append(f'<text x="{_LABEL}" y="{y}">0</text>')
    parts.append(f'<text x="{_WIDTH - 20}" y="{y}" text-anchor="end">{end * 1e6:.1f} us</text>')
    height = y + 8
    for index, name in enumerate(names):
        left = _LABEL + (_WIDTH - _LABEL) // _COLUMNS * (index % _COLUMNS)
        top = height + 18 * (index // _COLUMNS)
        parts.append(
            f'<circle cx="{left + 5}" cy="{top + 8}" r="5" fill="{_PALETTE[index % len(_PALETTE)]}"/>'
            f'<text x="{left + 16}" y="{top + 12}">{escape(name.removesuffix(".default"))}</text>'
        )
    return _svg(height + 18 * -(-len(names) // _COLUMNS) + 6, parts)


def memory_chart(blocks: Sequence[Block]) -> str:
    """Offsets upwards, operators from left to right: a block is a rectangle of its size and life."""
    if not blocks:
        return ""
    height = 240
    peak = max(block.offset + block.size for block in blocks) or 1
    steps = max(block.last for block in blocks) + 1
    x_scale, y_scale = (_WIDTH - _LABEL - 20) / steps, (height - 40) / peak
    parts = []
    for index, block in enumerate(blocks):
        tall = block.size * y_scale
        parts.append(
            f'<rect x="{_LABEL + block.first * x_scale:.1f}" y="{height - 24 - block.offset * y_scale - tall:.1f}"'
            f' width="{(block.last - block.first + 1) * x_scale:.1f}" height="{tall:.1f}"'
            f' fill="{_PALETTE[index % len(_PALETTE)]}" fill-opacity=".75" stroke="#fff" stroke-width=".5">'
            f"<title>{escape(block.name)}: {block.size} bytes at {block.offset},"
            f" operators {block.first} to {block.last}</title></rect>"
        )
    parts.append(f'<text x="{_LABEL - 6}" y="22" text-anchor="end">{_bytes(peak)}</text>')
    parts.append(f'<text x="{_LABEL - 6}" y="{height - 24}" text-anchor="end">0</text>')
    parts.append(f'<text x="{_LABEL}" y="{height - 6}">first operator</text>')
    parts.append(f'<text x="{_WIDTH - 20}" y="{height - 6}" text-anchor="end">last</text>')
    return _svg(height, parts)


def _svg(height: int, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" font-size="12">{"".join(parts)}</svg>'


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
