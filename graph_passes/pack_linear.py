"""CPU lowering: matrix products and tied embeddings on the packed weight layout of ``xllm::packed_linear``.

Matches: aten.linear on a plain weight; aten.embedding whose table is also the head's weight.
Rewrites: xllm::packed_linear, writing float32 directly where a cast to float32 is all that follows; and
    xllm::packed_embedding, so that a tied table is held once, in the head's layout.
Skips: a weight that is computed in the graph or read by another node.
Numerics: float32 accumulation, rounded once; in float32 to the order of summation.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from xllm_compile.graph_passes.region import PassReport, RegionGraph, args_of, insert_call
from xllm_compile.runtime.ops.reference import pack_weight
from xllm_compile.runtime.ops.spec import WeightSpec

aten = torch.ops.aten
xllm = torch.ops.xllm


def pack_linear(region: RegionGraph, *, tied_weights: frozenset[str] = frozenset()) -> PassReport:
    """``tied_weights``: names of embedding tables that a head also multiplies by."""
    report = PassReport(name="pack_linear", region=region.name)
    for node in region.graph.find_nodes(op="call_function", target=aten.linear.default):
        spec = region.weight_of(args_of(node)[1])
        if spec is None or len(args_of(node)[1].users) > 1:
            report.skip("weight is computed or shared")
            continue
        _rewrite_linear(region, node, spec)
        report.matches += 1
    for node in region.graph.find_nodes(op="call_function", target=aten.embedding.default):
        spec = region.weight_of(args_of(node)[0])
        if spec is None or spec.name not in tied_weights:
            report.skip("embedding is not tied")
            continue
        _rewrite_embedding(region, node, spec)
        report.matches += 1
    region.finish()
    return report


def _rewrite_linear(region: RegionGraph, node: fx.Node, spec: WeightSpec) -> None:
    x, weight = args_of(node)[:2]
    bias = args_of(node)[2] if len(args_of(node)) > 2 else None
    assert isinstance(weight, fx.Node)
    out_features = weight.meta["val"].shape[0]
    packed = _pack(region, weight, spec)
    cast = float_cast_after(node)
    target = xllm.packed_linear.default
    new = insert_call(region.graph, node, target, x, packed, bias, out_features, cast is not None)
    (cast or node).replace_all_uses_with(new)
    if cast is not None:
        region.graph.erase_node(cast)
    region.graph.erase_node(node)


def _rewrite_embedding(region: RegionGraph, node: fx.Node, spec: WeightSpec) -> None:
    table, token_ids = args_of(node)[:2]
    assert isinstance(table, fx.Node)
    columns = table.meta["val"].shape[1]
    packed = _pack(region, table, spec)
    new = insert_call(region.graph, node, xllm.packed_embedding.default, token_ids, packed, columns)
    node.replace_all_uses_with(new)
    region.graph.erase_node(node)


def _pack(region: RegionGraph, weight: fx.Node, spec: WeightSpec) -> fx.Node:
    """The same placeholder, now of the packed layout; its only reader is the node being rewritten."""
    value = weight.meta["val"]
    with value.fake_mode:
        packed = pack_weight(value)
    region.weights[weight.name] = replace(spec, shape=tuple(packed.shape), is_packed=True)
    weight.meta["val"] = packed
    return weight


def float_cast_after(node: fx.Node) -> fx.Node | None:
    """The cast to float32 that is the node's only reader."""
    if len(node.users) != 1:
        return None
    user: Any = next(iter(node.users))
    is_cast = user.target in (aten.to.dtype, aten._to_copy.default)
    return user if is_cast and user.meta["val"].dtype == torch.float32 else None
