"""A product, its sum over the ranks, the residual add and the norm after it, in one operator of the NPU.

Matches: xllm::add_rms_norm with one operand wait(all_reduce(linear(x, w))), a sum, in a 16-bit dtype.
Rewrites: xllm_npu::mm_all_reduce_add_rms_norm, GE's MatmulAllReduceAddRmsNorm (Ascend 910B; 1, 2, 4 or 8 ranks). The
    sum is normed as its parts arrive, instead of written, read, added and read again.
Skips: a sum that something else reads too, that is on a stream of its own (it overlaps computation), of no product, of
    one with a bias, in float32, or that is no sum. The sum at a layer's end is normed in the next region and does not
    match. On the CPU add_rms_norm is this fusion already: it reads the arrived sum once, and the wait is next to it.
Numerics: to the order of summation.
"""

import torch
from torch import fx

from xllm_compile.graph_passes.region import PassReport, RegionGraph, args_of, insert_call
from xllm_compile.runtime.ops.collectives import ALL_REDUCE, WAIT
from xllm_compile.runtime.ops.npu import declare_operators

aten = torch.ops.aten
xllm = torch.ops.xllm


def all_reduce_rms_norm(region: RegionGraph) -> PassReport:
    declare_operators()
    report = PassReport(name="all_reduce_rms_norm", region=region.name)
    for node in list(region.graph.find_nodes(op="call_function", target=xllm.add_rms_norm.default)):
        wait = next((side for side in args_of(node)[:2] if _is_sum(side)), None)
        if wait is not None and _match(wait, report):
            _rewrite(region, node, wait)
            report.matches += 1
    region.finish()
    return report


def _is_sum(node: fx.Node) -> bool:
    return node.target is WAIT and args_of(node)[0].target is ALL_REDUCE


def _match(wait: fx.Node, report: PassReport) -> bool:
    started = args_of(wait)[0]
    product, kind, _ = args_of(started)
    if started.meta.get("stream"):
        report.skip("sum overlaps computation")
    elif len(wait.users) > 1 or len(started.users) > 1:
        report.skip("sum is read elsewhere too")
    elif product.target is not aten.linear.default or len(product.users) > 1:
        report.skip("sum of no product")
    elif any(argument is not None for argument in args_of(product)[2:]) or kind != "sum":
        report.skip("product with a bias, or no sum")
    elif product.meta["val"].dtype == torch.float32:
        report.skip("float32 product")
    else:
        return True
    return False


def _rewrite(region: RegionGraph, node: fx.Node, wait: fx.Node) -> None:
    first, second, gamma, eps = args_of(node)
    residual = second if first is wait else first
    product, _, group = args_of(args_of(wait)[0])
    x, weight = args_of(product)[:2]
    columns = residual.meta["val"].shape[1]
    # The operator wants the residual as [batch, tokens, columns].
    rows = insert_call(region.graph, node, aten.view.default, residual, [1, -1, columns])
    target = torch.ops.xllm_npu.mm_all_reduce_add_rms_norm.default
    fused = insert_call(region.graph, node, target, x, weight, rows, gamma, group, eps)
    # Ours returns (normed, sum), theirs (sum, normed).
    for user in list(node.users):
        with region.graph.inserting_before(node):
            part = region.graph.call_function(user.target, (fused, 1 - args_of(user)[1]))  # type: ignore[arg-type]
        part.meta["val"] = fused.meta["val"][1 - args_of(user)[1]]
        user.replace_all_uses_with(insert_call(region.graph, node, aten.view.default, part, [-1, columns]))
        region.graph.erase_node(user)
    for done in (node, wait, args_of(wait)[0], product):
        region.graph.erase_node(done)
