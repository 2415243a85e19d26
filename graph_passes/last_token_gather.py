"""Gather the rows whose logits are wanted before the final norm and the head, not after.

Matches: index_select(axis 0) on a value computed row by row (linear, rms_norm, cast) from a region input.
Rewrites: the index_select moves up to that input; the row-wise operators then run on R rows, not T.
Skips: nothing; the pass is required on the head.
Numerics: bitwise where the kernels' rows do not depend on the number of rows, which the CPU kernels guarantee.
"""

from typing import Any

import torch
from torch import fx

from xllm_compile.graph_passes.region import PassReport, RegionGraph, args_of, insert_call

aten = torch.ops.aten

_ROW_WISE = {
    aten.linear.default,
    aten._to_copy.default,
    aten.to.dtype,
    torch.ops.xllm.rms_norm.default,
}


def last_token_gather(region: RegionGraph) -> PassReport:
    report = PassReport(name="last_token_gather", region=region.name)
    for gather in region.graph.find_nodes(op="call_function", target=aten.index_select.default):
        chain = _row_wise_chain(gather)
        if chain:
            _rewrite(region, gather, chain)
            report.matches += 1
    region.finish()
    return report


def _row_wise_chain(gather: fx.Node) -> list[fx.Node]:
    """Row-wise operators between a region input and the gather, in graph order."""
    source, axis = args_of(gather)[:2]
    if axis != 0:
        return []
    chain: list[fx.Node] = []
    node = source
    while isinstance(node, fx.Node) and node.target in _ROW_WISE and len(node.users) == 1:
        chain.insert(0, node)
        node = args_of(node)[0]
    return chain


def _rewrite(region: RegionGraph, gather: fx.Node, chain: list[fx.Node]) -> None:
    first = chain[0]
    node = insert_call(region.graph, first, aten.index_select.default, args_of(first)[0], 0, args_of(gather)[2])
    for old in chain:
        with region.graph.inserting_before(gather):
            target: Any = old.target
            new = region.graph.call_function(target, (node, *args_of(old)[1:]), dict(old.kwargs))
        rows = node.meta["val"].shape[0]
        new.meta["val"] = old.meta["val"].new_empty(rows, *old.meta["val"].shape[1:])
        node = new
    gather.replace_all_uses_with(node)
    region.graph.erase_node(gather)
