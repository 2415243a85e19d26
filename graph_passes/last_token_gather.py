"""Gather the rows whose logits are wanted before the final norm and the head, not after.

Matches: index_select(axis 0) on a value computed row by row (linear, rms_norm, add, cast) from region inputs.
Rewrites: the index_select moves up to those inputs; the row-wise operators then run on R rows, not T.
Skips: nothing; the pass is required on the head.
Numerics: bitwise where the kernels' rows do not depend on the number of rows, which the CPU kernels guarantee.
"""

from typing import Any

import torch
from torch import fx

from xllm_compile.graph_passes.region import PassReport, RegionGraph, args_of, insert_call

aten = torch.ops.aten

# How many of an operator's leading arguments are rows; the others belong to every row alike.
_ROW_OPERANDS = {
    aten.linear.default: 1,
    aten._to_copy.default: 1,
    aten.to.dtype: 1,
    aten.add.Tensor: 2,
    torch.ops.xllm.rms_norm.default: 1,
}


def last_token_gather(region: RegionGraph) -> PassReport:
    report = PassReport(name="last_token_gather", region=region.name)
    for gather in region.graph.find_nodes(op="call_function", target=aten.index_select.default):
        source, axis, rows = args_of(gather)
        if axis == 0 and _is_row_wise(source):
            gather.replace_all_uses_with(_gathered(region, gather, source, rows))
            region.graph.erase_node(gather)
            report.matches += 1
    region.finish()
    return report


def _is_row_wise(node: Any) -> bool:
    """Whether each row of the value depends on the same row of its operands, and nothing but the gather reads it."""
    if not (isinstance(node, fx.Node) and node.target in _ROW_OPERANDS and len(node.users) == 1):
        return False
    operands = args_of(node)[: _ROW_OPERANDS[node.target]]
    return all(isinstance(x, fx.Node) and x.meta["val"].shape[0] == node.meta["val"].shape[0] for x in operands)


def _gathered(region: RegionGraph, gather: fx.Node, node: fx.Node, rows: fx.Node) -> fx.Node:
    """The gathered rows of ``node``: computed from gathered operands as far up as that goes."""
    if not _is_row_wise(node):
        return insert_call(region.graph, gather, aten.index_select.default, node, 0, rows)
    target: Any = node.target
    count = _ROW_OPERANDS[target]
    operands = [_gathered(region, gather, operand, rows) for operand in args_of(node)[:count]]
    with region.graph.inserting_before(gather):
        new = region.graph.call_function(target, (*operands, *args_of(node)[count:]), dict(node.kwargs))
    value = node.meta["val"]
    new.meta["val"] = value.new_empty(rows.meta["val"].shape[0], *value.shape[1:])
    return new
