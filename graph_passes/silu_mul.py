"""SiLU(gate) * up on the merged gate-up product, in one operator.

Matches: mul(silu(part 0), part 1) where the two parts are the equal halves of one split_with_sizes.
Rewrites: xllm::silu_mul on the value that was split.
Skips: parts of different values, parts that are not the first and second half of the last axis.
Numerics: silu is no longer rounded to the model's dtype before the product; bitwise in float32.
"""

import operator

import torch
from torch import fx

from xllm_compile.graph_passes.region import PassReport, RegionGraph, args_of, insert_call

aten = torch.ops.aten


def silu_mul(region: RegionGraph) -> PassReport:
    report = PassReport(name="silu_mul", region=region.name)
    for node in region.graph.find_nodes(op="call_function", target=aten.mul.Tensor):
        gate_up = _match(node, report)
        if gate_up is not None:
            fused = insert_call(region.graph, node, torch.ops.xllm.silu_mul.default, gate_up)
            node.replace_all_uses_with(fused)
            report.matches += 1
    region.finish()
    return report


def _match(node: fx.Node, report: PassReport) -> fx.Node | None:
    """The value holding gate and up side by side."""
    silu, up = args_of(node)
    if not (isinstance(silu, fx.Node) and silu.target is aten.silu.default):
        silu, up = up, silu
    if not (isinstance(silu, fx.Node) and silu.target is aten.silu.default and isinstance(up, fx.Node)):
        return None
    gate = args_of(silu)[0]
    first, second = _part(gate), _part(up)
    if first is None or second is None or first[0] is not second[0]:
        report.skip("gate and up are not parts of one product")
        return None
    split, order = first[0], [first[1], second[1]]
    product: fx.Node = args_of(split)[0]
    sizes, axis = args_of(split)[1], args_of(split)[2] if len(args_of(split)) > 2 else 0
    is_last_axis = axis in (-1, product.meta["val"].dim() - 1)
    if order != [0, 1] or len(sizes) != 2 or sizes[0] != sizes[1] or not is_last_axis:
        report.skip("parts are not the two equal halves in order")
        return None
    return product


def _part(node: object) -> tuple[fx.Node, int] | None:
    """(split, index) of a value that is one part of a split_with_sizes."""
    if isinstance(node, fx.Node) and node.target is operator.getitem:
        split, index = args_of(node)
        if isinstance(split, fx.Node) and split.target is aten.split_with_sizes.default:
            return split, index
    return None
