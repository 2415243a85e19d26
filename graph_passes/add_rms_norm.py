"""Residual add and the RMSNorm that follows it, in one operator: the sum is written once and read once.

Matches: xllm::rms_norm(aten.add(x, residual)) with both of one shape; other readers of the sum stay.
Rewrites: (normed, sum) = xllm::add_rms_norm(x, residual, weight, eps).
Skips: a scaled add (alpha other than 1), a broadcasting add, operands of two dtypes.
Numerics: bitwise (the sum is rounded to the model's dtype before it is normed, as in the two operators).
"""

import operator

import torch
from torch import fx

from xllm_compile.graph_passes.region import PassReport, RegionGraph, args_of, insert_call

aten = torch.ops.aten
xllm = torch.ops.xllm


def add_rms_norm(region: RegionGraph) -> PassReport:
    report = PassReport(name="add_rms_norm", region=region.name)
    for node in region.graph.find_nodes(op="call_function", target=xllm.rms_norm.default):
        if _match(node, report):
            _rewrite(region, node)
            report.matches += 1
    region.finish()
    return report


def _match(node: fx.Node, report: PassReport) -> bool:
    add = args_of(node)[0]
    if not (isinstance(add, fx.Node) and add.target is aten.add.Tensor):
        return False
    x, residual = args_of(add)[:2]
    if add.kwargs.get("alpha", 1) != 1:
        report.skip("scaled add")
        return False
    if not all(isinstance(side, fx.Node) and side.meta["val"].shape == add.meta["val"].shape for side in (x, residual)):
        report.skip("broadcasting add")
        return False
    if x.meta["val"].dtype != residual.meta["val"].dtype:
        report.skip("operands of two dtypes")
        return False
    return True


def _rewrite(region: RegionGraph, node: fx.Node) -> None:
    add, weight, eps = args_of(node)
    assert isinstance(add, fx.Node)
    # The order of the operands is kept: residual first or second gives the same sum.
    fused = insert_call(region.graph, add, xllm.add_rms_norm.default, args_of(add)[1], args_of(add)[0], weight, eps)
    with region.graph.inserting_before(add):
        normed = region.graph.call_function(operator.getitem, (fused, 0))
        total = region.graph.call_function(operator.getitem, (fused, 1))
    normed.meta["val"], total.meta["val"] = fused.meta["val"]
    node.replace_all_uses_with(normed)
    add.replace_all_uses_with(total)
    region.graph.erase_node(node)
    region.graph.erase_node(add)
