"""Quantised products: the weights of the layers, and of the head where asked, as int8 or int4 with scales.

Matches: aten.linear on a plain weight in a layer region; in the head with ``has_head``.
Rewrites: xllm::int8_linear, int4_linear or int8_dynamic_linear on the packed values and their scales, two weights made
    from the same sources; float32 is written directly where a cast to float32 is all that follows.
Skips: a weight that is computed in the graph or read by another node; the head where it was not asked for; fewer than
    32 outputs or inputs, which padding and scales would make no smaller; int4 where the reduction axis is no multiple
    of the group.
Numerics: changes them, opt-in. int8 is off by half a step of 1/127 of a channel's largest weight, int4 by one of 1/8 of
    a group's; int8-dynamic rounds each token's activations by as much. The rewritten graph equals the operators'
    references on the same rounded weights.
"""

from dataclasses import replace

import torch
from torch import fx

from xllm_compile.graph_passes.pack_linear import float_cast_after
from xllm_compile.graph_passes.quantisation import Quantisation
from xllm_compile.graph_passes.region import PassReport, RegionGraph, args_of, insert_call
from xllm_compile.runtime.ops.quantised import quantise_packed_meta
from xllm_compile.runtime.ops.spec import WeightSpec

aten = torch.ops.aten
xllm = torch.ops.xllm

_MIN_FEATURES = 32
_OPERATORS = {
    "int8": xllm.int8_linear.default,
    "int4": xllm.int4_linear.default,
    "int8-dynamic": xllm.int8_dynamic_linear.default,
}


def quantise(region: RegionGraph, *, quantisation: Quantisation) -> PassReport:
    report = PassReport(name="quantise", region=region.name)
    for node in region.graph.find_nodes(op="call_function", target=aten.linear.default):
        if _match(region, node, quantisation, report):
            _rewrite(region, node, quantisation)
            report.matches += 1
    region.finish()
    return report


def _match(region: RegionGraph, node: fx.Node, quantisation: Quantisation, report: PassReport) -> bool:
    weight = args_of(node)[1]
    if region.weight_of(weight) is None or len(weight.users) > 1:
        report.skip("weight is computed or shared")
        return False
    if not (region.name.startswith("layer") or (quantisation.has_head and region.name == "head")):
        report.skip(f"{region.name} keeps its weight")
        return False
    out_features, in_features = weight.meta["val"].shape
    if min(out_features, in_features) < _MIN_FEATURES:
        report.skip(f"fewer than {_MIN_FEATURES} outputs or inputs")
        return False
    if quantisation.group_size and in_features % quantisation.group_size:
        report.skip(f"{in_features} inputs are no multiple of the group of {quantisation.group_size}")
        return False
    return True


def _rewrite(region: RegionGraph, node: fx.Node, quantisation: Quantisation) -> None:
    x, weight = args_of(node)[:2]
    bias = args_of(node)[2] if len(args_of(node)) > 2 else None
    assert isinstance(weight, fx.Node)
    out_features = weight.meta["val"].shape[0]
    values, scale = _quantised_weights(region, weight, quantisation)
    cast = float_cast_after(node)
    target = _OPERATORS[quantisation.scheme]
    new = insert_call(region.graph, node, target, x, values, scale, bias, out_features, cast is not None)
    (cast or node).replace_all_uses_with(new)
    if cast is not None:
        region.graph.erase_node(cast)
    region.graph.erase_node(node)


def _quantised_weights(region: RegionGraph, weight: fx.Node, quantisation: Quantisation) -> tuple[fx.Node, fx.Node]:
    """Placeholders of the values, under the weight's own name, and of their scales."""
    plain, value = region.weights[weight.name], weight.meta["val"]
    # The dynamic scheme differs in what is done to the activations: the weights are those of int8.
    kind = "int4" if quantisation.scheme == "int4" else "int8"
    group_size = quantisation.group_size or 0

    with value.fake_mode:
        values, scale = quantise_packed_meta(value, kind, group_size)

    def specify(name: str, quantised: str, tensor: torch.Tensor) -> WeightSpec:
        dtype = str(tensor.dtype).removeprefix("torch.")
        spec = replace(plain, name=name, shape=tuple(tensor.shape), dtype=dtype, is_packed=tensor.dim() > 1)
        return replace(spec, quantised=quantised, group_size=group_size)

    region.weights[weight.name] = specify(plain.name, kind, values)
    weight.meta["val"] = values
    scale_spec = specify(plain.name + ".scale", kind + ".scale", scale)
    return weight, region.replace_weights([weight], scale_spec, scale)
