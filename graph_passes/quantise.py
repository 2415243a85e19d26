"""Quantised products: the weights of the layers, and of the head where asked, as int8 or int4 with scales.

Matches: aten.linear on a plain weight in a layer region; with ``has_head`` in the head, and aten.embedding on the table
    that a head shares.
Rewrites: xllm::int8_linear, int4_linear, int8_dynamic_linear or int4_dynamic_linear on the packed values and their
    scales, two weights made from the same sources; float32 is written directly where a cast to float32 is all that
    follows. Of a checkpoint that is quantised already what has groups or zero points becomes int8_zero_linear or
    int4_zero_linear, on values, scales and zero points.
    The head is int8 with int4 layers too, and a table it shares is read by xllm::int8_embedding.
Skips: a weight that is computed in the graph or read by another node; the head where it was not asked for; fewer than
    32 outputs or inputs, which padding and scales would make no smaller; int4 where the reduction axis is no multiple
    of the group. What the checkpoint holds quantised cannot be skipped: that is an error.
Numerics: those of the checkpoint's own values, where it is quantised already. Otherwise changes them, opt-in: int8 is
    off by half a step of 1/127 of a channel's largest weight, int4 by one of 1/8 of a group's; the dynamic schemes
    round each token's activations by half a step of 1/127 of its largest, whoever made the weights. The rewritten graph
    equals the operators' references on the same rounded weights.
"""

from dataclasses import replace

import torch
from torch import fx

from xllm_compile.graph_passes.pack_linear import float_cast_after
from xllm_compile.graph_passes.quantisation import Quantisation
from xllm_compile.graph_passes.region import PassReport, RegionGraph, args_of, insert_call
from xllm_compile.runtime.ops.quantised import quantise_packed_meta, stored_meta
from xllm_compile.runtime.ops.spec import WeightSpec

aten = torch.ops.aten
xllm = torch.ops.xllm

_MIN_FEATURES = 32
_OPERATORS = {
    "int8": xllm.int8_linear.default,
    "int4": xllm.int4_linear.default,
    "int8-dynamic": xllm.int8_dynamic_linear.default,
    "int4-dynamic": xllm.int4_dynamic_linear.default,
}
_ZERO_OPERATORS = {"int8": xllm.int8_zero_linear.default, "int4": xllm.int4_zero_linear.default}


def quantise(
    region: RegionGraph, *, quantisation: Quantisation, tied_weights: frozenset[str] = frozenset()
) -> PassReport:
    """``tied_weights``: names of embedding tables that a head also multiplies by."""
    report = PassReport(name="quantise", region=region.name)
    if not region.name.startswith("layer"):
        # Four bits of a head cost more accuracy than those of a layer, and a table's rows are read one by one. Nobody
        # but us quantises a head.
        scheme = quantisation.scheme.replace("int4", "int8")
        quantisation = replace(quantisation, scheme=scheme, group_size=None, stored_by="")
    for node in region.graph.find_nodes(op="call_function", target=aten.linear.default):
        if _match(region, args_of(node)[1], quantisation, report):
            _rewrite(region, node, quantisation)
            report.matches += 1
    tables = region.graph.find_nodes(op="call_function", target=aten.embedding.default) if quantisation.has_head else ()
    for node in tables:
        spec = region.weight_of(args_of(node)[0])
        if spec is not None and spec.name in tied_weights and _match(region, args_of(node)[0], quantisation, report):
            _rewrite_embedding(region, node, quantisation)
            report.matches += 1
    region.finish()
    return report


def _match(region: RegionGraph, weight: fx.Node, quantisation: Quantisation, report: PassReport) -> bool:
    if region.weight_of(weight) is None or len(weight.users) > 1:
        report.skip("weight is computed or shared")
        return False
    if not (region.name.startswith("layer") or quantisation.has_head):
        report.skip(f"{region.name} keeps its weight")
        return False
    out_features, in_features = weight.meta["val"].shape
    if quantisation.stored_by:
        _check_stored(region, weight.name, in_features, quantisation)
        return True
    if min(out_features, in_features) < _MIN_FEATURES:
        report.skip(f"fewer than {_MIN_FEATURES} outputs or inputs")
        return False
    if quantisation.group_size and in_features % quantisation.group_size:
        report.skip(f"{in_features} inputs are no multiple of the group of {quantisation.group_size}")
        return False
    return True


def _check_stored(region: RegionGraph, weight: str, in_features: int, quantisation: Quantisation) -> None:
    """A rank's part of the reduction axis must be whole groups, and whole steps of the kernels."""
    unit = quantisation.group_size or (8 if _has_zero_points(quantisation) else 1)
    if in_features % unit:
        raise ValueError(
            f"{region.weights[weight].name} has {in_features} inputs on a rank, no multiple of {unit}, which the"
            f" checkpoint's {quantisation.label} needs; use a smaller --tensor-parallel-size or an unquantised"
            " checkpoint"
        )


def _has_zero_points(quantisation: Quantisation) -> bool:
    return bool(quantisation.stored_by) and quantisation.group_size is not None


def _rewrite(region: RegionGraph, node: fx.Node, quantisation: Quantisation) -> None:
    x, weight = args_of(node)[:2]
    bias = args_of(node)[2] if len(args_of(node)) > 2 else None
    assert isinstance(weight, fx.Node)
    out_features = weight.meta["val"].shape[0]
    operands = _quantised_weights(region, weight, quantisation)
    cast = float_cast_after(node)
    target = (_ZERO_OPERATORS if _has_zero_points(quantisation) else _OPERATORS)[quantisation.scheme]
    new = insert_call(region.graph, node, target, x, *operands, bias, out_features, cast is not None)
    (cast or node).replace_all_uses_with(new)
    if cast is not None:
        region.graph.erase_node(cast)
    region.graph.erase_node(node)


def _rewrite_embedding(region: RegionGraph, node: fx.Node, quantisation: Quantisation) -> None:
    table, token_ids = args_of(node)[:2]
    assert isinstance(table, fx.Node)
    columns, is_float32 = table.meta["val"].shape[1], node.meta["val"].dtype == torch.float32
    operands = _quantised_weights(region, table, quantisation)
    new = insert_call(region.graph, node, xllm.int8_embedding.default, token_ids, *operands, columns, is_float32)
    node.replace_all_uses_with(new)
    region.graph.erase_node(node)


def _quantised_weights(region: RegionGraph, weight: fx.Node, quantisation: Quantisation) -> list[fx.Node]:
    """Placeholders of the values, under the weight's own name, of their scales and, where there are, of the zeros."""
    plain, value = region.weights[weight.name], weight.meta["val"]
    kind = quantisation.weight_kind
    group_size = quantisation.group_size or 0

    with value.fake_mode:
        if _has_zero_points(quantisation):
            values, *others = stored_meta(value, kind, group_size)
        else:
            values, *others = quantise_packed_meta(value, kind, group_size)

    def specify(name: str, quantised: str, tensor: torch.Tensor) -> WeightSpec:
        dtype = str(tensor.dtype).removeprefix("torch.")
        spec = replace(plain, name=name, shape=tuple(tensor.shape), dtype=dtype, is_packed=tensor.dim() > 1)
        return replace(spec, quantised=quantised, group_size=group_size)

    region.weights[weight.name] = specify(plain.name, kind, values)
    weight.meta["val"] = values
    operands = [weight]
    for part, tensor in zip(("scale", "zero"), others, strict=False):
        spec = specify(f"{plain.name}.{part}", f"{kind}.{part}", tensor)
        operands.append(region.replace_weights([weight], spec, tensor))
    return operands
