"""Where every intermediate of every graph lies in the pool that all graphs share: liveness, then best fit by size.

Matches: every tensor that a graph's operators make, and the tensors that the region before hands over.
Rewrites: nothing; the plan is an analysis. A view lies where its base does. Offsets are relative to the pool's base.
Skips: weights, the KV cache and integer metadata, which live elsewhere; a tensor whose size no symbol gives.
Numerics: bitwise.

The device's pool does at run time what `Arena` does here (runtime/ops/cpu/pool.cpp): it frees a tensor when its last
reader is done and places the next best fit, so the peak of a step is known at build time. Graphs run one after the
other: the pool is as large as the largest needs, never as all of them together.
"""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx

from xllm_compile.graph_passes.region import PassReport, RegionGraph, args_of

ALIGNMENT = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Buffer:
    """One allocation. ``first`` and ``last`` are the places in the graph's order where it is made and last read;
    what is handed over is made before the first, and what is returned is read after the last."""

    name: str
    shape: tuple[int | str, ...]
    itemsize: int
    first: int
    last: int

    def num_bytes(self, sizes: Mapping[str, int]) -> int:
        """Of the allocation, aligned."""
        count = self.itemsize
        for size in self.shape:
            count *= size if isinstance(size, int) else sizes[size]
        return -(-count // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, kw_only=True, slots=True)
class Lifetimes:
    """The buffers of one region: ``inputs`` are held by the caller all along, ``outputs`` go to the next region."""

    region: str
    buffers: tuple[Buffer, ...]
    outputs: tuple[str, ...]
    """Names of buffers that are returned."""
    end: int

    @property
    def inputs(self) -> tuple[Buffer, ...]:
        return tuple(buffer for buffer in self.buffers if buffer.first < 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphPlan:
    """The layout of one graph in the pool, were it to run alone."""

    region: str
    sizes: dict[str, int]
    peak_bytes: int
    """The end of the highest buffer."""
    live_bytes: int
    """The most that is alive at the same time: no layout needs less."""
    offsets: dict[str, tuple[int, int]]
    """Buffer -> (offset from the pool's base, bytes)."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Arena:
    """Best fit over one range, lowest address first."""

    def __init__(self) -> None:
        self._free: dict[int, int] = {0: 1 << 60}
        self._used: dict[int, int] = {}
        self.peak_bytes = 0
        self.live_bytes = 0
        self.max_live_bytes = 0

    def take(self, num_bytes: int) -> int:
        """The offset of a new block."""
        size, offset = min((size, offset) for offset, size in self._free.items() if size >= num_bytes)
        del self._free[offset]
        self._free[offset + num_bytes] = size - num_bytes
        if size == num_bytes:
            del self._free[offset + num_bytes]
        self._used[offset] = num_bytes
        self.peak_bytes = max(self.peak_bytes, offset + num_bytes)
        self.live_bytes += num_bytes
        self.max_live_bytes = max(self.max_live_bytes, self.live_bytes)
        return offset

    def free(self, offset: int) -> None:
        size = self._used.pop(offset)
        self.live_bytes -= size
        if offset + size in self._free:
            size += self._free.pop(offset + size)
        before = next((low for low, n in self._free.items() if low + n == offset), None)
        if before is not None:
            self._free[before] += size
        else:
            self._free[offset] = size


def lifetimes(region: RegionGraph) -> tuple[Lifetimes, PassReport]:
    """Of the region as it is after the passes."""
    report = PassReport(name="memory_plan", region=region.name)
    symbols = {
        str(size): letter
        for spec in region.inputs
        for letter, size in zip(spec.shape, region.placeholder(spec.name).meta["val"].shape, strict=True)
        if isinstance(letter, str)
    }
    calls = [node for node in region.graph.nodes if node.op == "call_function"]
    place = {node: index for index, node in enumerate(calls)}
    returned = [node for node in args_of(region.graph.output_node())[0] if isinstance(node, fx.Node)]
    handed = [region.placeholder(spec.name) for spec in region.inputs if _is_handed_over(spec.shape, spec.dtype)]
    bases = {node: node for node in handed}
    for node in calls:
        bases[node] = _base(node, bases)
    end = len(calls)
    last: dict[fx.Node, int] = dict.fromkeys(handed, end)
    for node, base in bases.items():
        readers = [place[user] for user in node.users if user in place]
        last[base] = max([last.get(base, -1), place.get(base, -1), *readers, *([end] if node in returned else [])])
    buffers = []
    for node in [*handed, *calls]:
        value = node.meta["val"]
        if bases[node] is not node or not isinstance(value, torch.Tensor):
            continue
        if any(isinstance(size, torch.SymInt) and str(size) not in symbols for size in value.shape):
            report.skip("size of no symbol")
            continue
        shape = tuple(symbols[str(size)] if isinstance(size, torch.SymInt) else int(size) for size in value.shape)
        first = place.get(node, -1)
        if args_of(node) and node.target is operator.getitem:
            first = place[args_of(node)[0]]
        buffers.append(Buffer(name=node.name, shape=shape, itemsize=value.dtype.itemsize, first=first, last=last[node]))
        report.matches += 1
    names = {buffer.name for buffer in buffers}
    outputs = tuple(bases[node].name for node in returned if bases[node].name in names)
    return Lifetimes(region=region.name, buffers=tuple(buffers), outputs=outputs, end=end), report


def _is_handed_over(shape: Sequence[int | str], dtype: str) -> bool:
    """Activations are floats with a row per token; metadata are integers, and the cache has slots."""
    return "T" in shape and not dtype.startswith("int")


def _base(node: fx.Node, bases: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """The node that allocates what ``node`` gives: its own operator, or the one it is a view of."""
    if node.target is operator.getitem:
        source = args_of(node)[0]
        # A part of a split lies in what was split; a result of several is an allocation of its own.
        return bases[source] if _is_view(source) else node
    if _is_view(node):
        source = args_of(node)[0]
        return bases.get(source, node)
    return node


def _is_view(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and any(
        returned.alias_info is not None and not returned.alias_info.is_write for returned in node.target._schema.returns
    )


def plan_graph(region: Lifetimes, sizes: Mapping[str, int]) -> GraphPlan:
    """The layout of one graph for ``sizes``, which must give every symbol."""
    arena = Arena()
    offsets = {buffer.name: arena.take(buffer.num_bytes(sizes)) for buffer in region.inputs}
    _run(arena, region, sizes, offsets)
    return GraphPlan(
        region=region.region,
        sizes=dict(sizes),
        peak_bytes=arena.peak_bytes,
        live_bytes=arena.max_live_bytes,
        offsets={buffer.name: (offsets[buffer.name], buffer.num_bytes(sizes)) for buffer in region.buffers},
    )


def _run(arena: Arena, region: Lifetimes, sizes: Mapping[str, int], offsets: dict[str, int]) -> None:
    """Place and free the region's own buffers in the order its operators run; what it returns stays."""
    for at in range(region.end):
        for buffer in region.buffers:
            if buffer.first == at:
                offsets[buffer.name] = arena.take(buffer.num_bytes(sizes))
        for buffer in region.buffers:
            if buffer.last == at and buffer.first >= 0 and buffer.name not in region.outputs:
                arena.free(offsets[buffer.name])


def plan_step(
    embed: Lifetimes, layers: Iterable[Lifetimes], head: Lifetimes, sizes: Mapping[str, int], num_state: int
) -> int:
    """Bytes of the pool that a step needs: embed, every layer (piece) in order, the head; ``num_state`` outputs of
    embed go from layer to layer, the others are held until the last."""
    arena = Arena()
    offsets: dict[str, int] = {}
    _run(arena, embed, sizes, offsets)
    state = [offsets[name] for name in embed.outputs[:num_state]]
    held = [offsets[name] for name in embed.outputs[num_state:]]
    for layer in layers:
        offsets = {buffer.name: offset for buffer, offset in zip(layer.inputs, state, strict=False)}
        _run(arena, layer, sizes, offsets)
        following = [offsets[name] for name in layer.outputs]
        _free(arena, [offset for offset in state if offset not in following])
        state = following
    _free(arena, held)
    _run(arena, head, sizes, {})
    return arena.peak_bytes


def _free(arena: Arena, offsets: Sequence[int]) -> None:
    for offset in offsets:
        arena.free(offset)
