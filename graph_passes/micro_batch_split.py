"""Split the tokens of a step in two halves that share nothing but the KV cache, so that one can compute while the
other's collective is on its way.

Matches: a region that carries ``delta`` and ``residual``. Half 0 has the first T - T//2 tokens, half 1 the rest.
Rewrites: a layer's body is there twice, on ``delta_0``, ``residual_0`` and ``delta_1``, ``residual_1``; embed cuts what
    it returns, the head joins what it takes. The metadata of each half is computed from the step's: a sequence that the
    cut goes through is a chunk in half 0, continued in half 1, whose cache half 0 writes first.
Skips: a layer without collectives; an operator that is not known to treat each token by itself.
Numerics: bitwise where a kernel's rows do not depend on the number of rows, which the CPU kernels guarantee, and where
    a collective sums an element alike wherever it stands (two ranks always do).
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from xllm_compile.graph_passes.region import PassReport, RegionGraph, insert_call
from xllm_compile.runtime.ops.collectives import ALL_REDUCE, WAIT
from xllm_compile.runtime.ops.spec import TensorSpec

aten = torch.ops.aten
xllm = torch.ops.xllm

CARRIED = ("delta", "residual")
"""Inputs that a region takes from the one before it."""
HALVES = (0, 1)
HALF_SIZES = ("TA", "TB")
"""Symbols of the two halves' token counts."""

# Each token's result depends on that token alone, or on what the metadata of its half says.
_TOKEN_WISE = {
    aten.linear.default,
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.silu.default,
    aten.view.default,
    aten.split_with_sizes.default,
    operator.getitem,
    xllm.rms_norm.default,
    xllm.add_rms_norm.default,
    xllm.silu_mul.default,
    xllm.rope.default,
    xllm.kv_write.default,
    xllm.qkv_rope_write.default,
    xllm.attention.default,
    xllm.packed_linear.default,
    xllm.int8_linear.default,
    xllm.int4_linear.default,
    xllm.int8_zero_linear.default,
    xllm.int4_zero_linear.default,
    xllm.int8_dynamic_linear.default,
    xllm.int4_dynamic_linear.default,
    ALL_REDUCE,
    WAIT,
}


def split_sizes(num_tokens: int) -> dict[str, int]:
    """The symbols of the halves of a step of ``num_tokens``."""
    return dict(zip(HALF_SIZES, (num_tokens - num_tokens // 2, num_tokens // 2), strict=True))


def micro_batch_split(region: RegionGraph) -> PassReport:
    report = PassReport(name="micro_batch_split", region=region.name)
    kind = region.name.partition(".")[0]
    rewrite = {"embed": _cut_outputs, "head": _join_inputs}.get(kind, _duplicate)
    if _match(region, kind, report):
        rewrite(region)
        report.matches += 1
    region.finish()
    return report


def _match(region: RegionGraph, kind: str, report: PassReport) -> bool:
    names = [spec.name for spec in region.inputs]
    if kind == "embed":
        return not _is_cut(region)
    if not set(CARRIED) <= set(names):
        return False
    if kind == "head":
        return True
    calls = [node for node in region.graph.nodes if node.op == "call_function"]
    if not any(node.target is ALL_REDUCE for node in calls):
        report.skip("no collective to hide")
        return False
    unknown = sorted({str(node.target) for node in calls if node.target not in _TOKEN_WISE})
    for name in unknown:
        report.skip(f"{name} is not known to treat each token by itself")
    return not unknown


def _is_cut(region: RegionGraph) -> bool:
    return any(node.meta.get("micro_batch") is not None for node in region.graph.nodes)


def _cut_outputs(region: RegionGraph) -> None:
    output = region.graph.output_node()
    (values,) = output.args
    carried, others = list(values)[: len(CARRIED)], list(values)[len(CARRIED) :]  # type: ignore[arg-type]
    tokens = _call(region, output, aten.sym_size.int, carried[0], 0)
    second = _call(region, output, operator.floordiv, tokens, 2)
    first = _call(region, output, operator.sub, tokens, second)
    halves = []
    for value in carried:
        parts = insert_call(region.graph, output, aten.split_with_sizes.default, value, [first, second], 0)
        for half in HALVES:
            part = _call(region, output, operator.getitem, parts, half)
            part.meta["micro_batch"] = half
            halves.append(part)
    output.args = ((*halves, *others),)


def _join_inputs(region: RegionGraph) -> None:
    before = next(node for node in region.graph.nodes if node.op == "call_function")
    for name in CARRIED:
        whole = region.placeholder(name)
        joined = insert_call(region.graph, before, aten.cat.default, _halve_placeholder(region, whole), 0)
        whole.replace_all_uses_with(joined)
        region.graph.erase_node(whole)
    region.inputs = _halved_specs(region.inputs)


def _duplicate(region: RegionGraph) -> None:
    graph, output = region.graph, region.graph.output_node()
    body = [node for node in graph.nodes if node.op == "call_function"]
    first = body[0]
    carried = {name: _halve_placeholder(region, region.placeholder(name)) for name in CARRIED}
    halves: list[dict[fx.Node, fx.Node]] = [
        {region.placeholder(n): carried[n][half] for n in CARRIED} for half in HALVES
    ]
    _halve_metadata(region, first, carried["delta"], halves)
    for half, mapped in zip(HALVES, halves, strict=True):
        for node in body:
            mapped[node] = _copy(graph, output, node, mapped)
            mapped[node].meta["micro_batch"] = half
    (values,) = output.args
    output.args = (tuple(mapped[value] for value in values for mapped in halves),)  # type: ignore[union-attr, index]
    for node in reversed(body):
        graph.erase_node(node)
    for name in CARRIED:
        graph.erase_node(region.placeholder(name))
    region.inputs = _halved_specs(region.inputs)


def _halve_metadata(
    region: RegionGraph, before: fx.Node, deltas: list[fx.Node], halves: list[dict[fx.Node, fx.Node]]
) -> None:
    """Per-token inputs are cut; seq_start is clamped to each half's rows, and half 0's contexts end at the cut."""

    def call(target: Callable[..., Any], *args: Any) -> fx.Node:
        return _call(region, before, target, *args)

    sizes = [call(aten.sym_size.int, delta, 0) for delta in deltas]
    for name in ("cos", "sin", "positions"):
        whole = region.placeholder(name)
        parts = call(aten.split_with_sizes.default, whole, sizes, 0)
        for half, mapped in zip(HALVES, halves, strict=True):
            mapped[whole] = call(operator.getitem, parts, half)
    seq_start, context_len = region.placeholder("seq_start"), region.placeholder("context_len")
    num_seqs = call(aten.sym_size.int, context_len, 0)
    last = call(operator.add, num_seqs, 1)
    starts = [
        call(aten.clamp_max.default, seq_start, sizes[0]),
        call(aten.clamp_min.default, call(aten.sub.Scalar, seq_start, sizes[0]), 0),
    ]
    # What half 1 has of each sequence is not in the cache yet when half 0 attends.
    ends_1 = call(aten.slice.Tensor, starts[1], 0, 1, last)
    begins_1 = call(aten.slice.Tensor, starts[1], 0, 0, num_seqs)
    context_0 = call(aten.sub.Tensor, context_len, call(aten.sub.Tensor, ends_1, begins_1))
    for mapped, start, context in zip(halves, starts, (context_0, context_len), strict=True):
        mapped[seq_start], mapped[context_len] = start, context


def _halve_placeholder(region: RegionGraph, whole: fx.Node) -> list[fx.Node]:
    value = whole.meta["val"]
    second = value.shape[0] // 2
    parts = []
    for half, size in zip(HALVES, (value.shape[0] - second, second), strict=True):
        with region.graph.inserting_before(whole):
            part = region.graph.placeholder(f"{whole.name}_{half}")
        with value.fake_mode:
            part.meta["val"] = value.new_empty(size, *value.shape[1:])
        part.meta["micro_batch"] = half
        parts.append(part)
    return parts


def _halved_specs(inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    specs = []
    for spec in inputs:
        if spec.name not in CARRIED:
            specs.append(spec)
            continue
        for half, size in zip(HALVES, HALF_SIZES, strict=True):
            specs.append(TensorSpec(name=f"{spec.name}_{half}", shape=(size, *spec.shape[1:]), dtype=spec.dtype))
    return tuple(specs)


def _call(region: RegionGraph, before: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
    """Like insert_call, for arguments that may be sizes only."""
    with region.graph.inserting_before(before):
        node = region.graph.call_function(target, args)
    _evaluate(node)
    return node


def _copy(graph: fx.Graph, before: fx.Node, node: fx.Node, mapped: dict[fx.Node, fx.Node]) -> fx.Node:
    with graph.inserting_before(before):
        copied = graph.node_copy(node, lambda argument: mapped.get(argument, argument))
    _evaluate(copied)
    return copied


def _evaluate(node: fx.Node) -> None:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    target: Any = node.target
    fake = next((v for v in (n.meta["val"] for n in node.all_input_nodes) if isinstance(v, torch.Tensor)), None)
    if fake is None:
        node.meta["val"] = target(*args, **kwargs)
        return
    with fake.fake_mode:  # type: ignore[attr-defined]
        node.meta["val"] = target(*args, **kwargs)
