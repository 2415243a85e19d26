"""Partial graphs: a region cut at its attention operators, which stay outside the compiled pieces and run eagerly.

Matches: xllm::attention in a region whose leading inputs are as many as its outputs (the state that layers hand on).
Rewrites: pieces in order, each a region of its own: compiled, attention, compiled, ... A piece takes what earlier
    pieces computed and later ones read as its leading inputs, then every other input of the region, then the weights
    it reads; it returns the next piece's leading inputs.
Skips: a value that is no tensor, or of a size no input has, crosses a cut; a value passes a compiled piece unread.
Numerics: bitwise: the same operators in the same order.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import fx

from xllm_compile.graph_passes.region import PassReport, RegionGraph, args_of
from xllm_compile.runtime.ops.spec import TensorSpec

_ATTENTION = torch.ops.xllm.attention.default


def partition(region: RegionGraph) -> tuple[list[RegionGraph], PassReport]:
    """The pieces of ``region``, or the region itself, untouched, where it has no attention or cannot be cut."""
    report = PassReport(name="partition", region=region.name)
    pieces = _cut(region)
    cuts = [piece for piece in pieces if piece[0].target is _ATTENTION]
    if not cuts:
        return [region], report
    states = _states(region, pieces)
    reason = _obstacle(region, pieces, states)
    if reason is not None:
        report.skip(reason)
        return [region], report
    report.matches = len(cuts)
    names = [f"{region.name}.{index}" + ".attention" * runs_eagerly(piece) for index, piece in enumerate(pieces)]
    return [
        _build(region, name, piece, states[index], states[index + 1])
        for index, (name, piece) in enumerate(zip(names, pieces, strict=True))
    ], report


def runs_eagerly(nodes: Iterable[fx.Node]) -> bool:
    """Whether a piece of these nodes is kept out of the compiled graphs."""
    return any(node.target is _ATTENTION for node in nodes)


def _cut(region: RegionGraph) -> list[list[fx.Node]]:
    """The calls of the graph in order, each attention in a piece of its own."""
    pieces: list[list[fx.Node]] = [[]]
    for node in region.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is _ATTENTION:
            pieces += [[node], []]
        else:
            pieces[-1].append(node)
    return [piece for piece in pieces if piece]


def _outputs(region: RegionGraph) -> list[fx.Node]:
    return list(args_of(region.graph.output_node())[0])


def _states(region: RegionGraph, pieces: Sequence[Sequence[fx.Node]]) -> list[list[fx.Node]]:
    """What is handed to each piece, in order of definition; last, what the region returns."""
    outputs = _outputs(region)
    state = [region.placeholder(spec.name) for spec in region.inputs[: len(outputs)]]
    known = {*state, *(node for piece in pieces for node in piece)}
    states, defined = [state], list(state)
    for index, piece in enumerate(pieces[:-1]):
        defined += piece
        later = {source for rest in pieces[index + 1 :] for node in rest for source in node.all_input_nodes}
        wanted = (later | set(outputs)) & known
        crossing = [node for node in defined if node in wanted]
        # What attention reads, and what it gives, lead.
        first = args_of(pieces[index + 1][0])[0] if runs_eagerly(pieces[index + 1]) else piece[-1]
        states.append(sorted(crossing, key=lambda node: node is not first))
    return [*states, outputs]


def _obstacle(
    region: RegionGraph, pieces: Sequence[Sequence[fx.Node]], states: Sequence[Sequence[fx.Node]]
) -> str | None:
    symbols = _symbols(region)
    for index, piece in enumerate(pieces):
        for node in states[index]:
            if not isinstance(node.meta["val"], torch.Tensor):
                return "a value that is no tensor crosses the cut"
            if any(isinstance(n, torch.SymInt) and str(n) not in symbols for n in node.meta["val"].shape):
                return "a value of a computed size crosses the cut"
        if not runs_eagerly(piece) and set(states[index]) & set(states[index + 1]):
            return "a value passes through a compiled piece"
    return None


def _symbols(region: RegionGraph) -> dict[str, str]:
    """The traced size, as text -> its letter."""
    return {
        str(size): letter
        for spec in region.inputs
        for letter, size in zip(spec.shape, region.placeholder(spec.name).meta["val"].shape, strict=True)
        if isinstance(letter, str)
    }


def _build(
    region: RegionGraph, name: str, nodes: Sequence[fx.Node], state: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> RegionGraph:
    symbols = _symbols(region)
    metadata = region.inputs[len(_outputs(region)) :]
    used = {source for node in nodes for source in node.all_input_nodes}
    weights = {key: spec for key, spec in region.weights.items() if region.placeholder(key) in used}
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in [*state, *(region.placeholder(key) for key in [*(spec.name for spec in metadata), *weights])]:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta["val"] = node.meta["val"]
    for node in nodes:
        copies[node] = graph.node_copy(node, lambda source: copies[source])
    graph.output(tuple(copies[node] for node in outputs))
    piece = RegionGraph(
        name=name,
        module=fx.GraphModule(region.module, graph),
        inputs=(*(_spec(node, symbols) for node in state), *metadata),
        weights=weights,
    )
    piece.finish()
    return piece


def _spec(node: fx.Node, symbols: dict[str, str]) -> TensorSpec:
    value = node.meta["val"]
    shape = tuple(symbols[str(n)] if isinstance(n, torch.SymInt) else int(n) for n in value.shape)
    return TensorSpec(name=node.name, shape=shape, dtype=str(value.dtype).removeprefix("torch."))
