"""Order a region that runs on two halves so that one computes while the other's collective is on its way.

Matches: a region whose body micro_batch_split has put there twice.
Rewrites: the halves' parts between two collectives alternate: 0 up to its first all-reduce, 1 up to its first, 0 up
    to its second, and so on. Each all-reduce is started where its input is ready and waited for where its half goes on,
    after the other half's part. The last ones are waited for by the next region: a region returns ``delta_0`` and
    ``delta_1`` while they may still be on their way, and every region waits for what it takes before it reads it.
    ``meta["stream"]`` is 1 on collectives, 0 on everything else.
Skips: a region that was not split; one that takes no sum over the ranks.
Lowering: on the CPU collectives run beside the graph by themselves, and the place of their waits is all there is to it;
    on the NPU streams become scopes (lower_npu.py). There is none to CUDA streams and events: that target has no
    kernels that they could order.
Numerics: bitwise: only the order changes, and no operator passes one it depends on.
"""

import torch
from torch import fx

from xllm_compile.graph_passes.micro_batch_split import HALVES
from xllm_compile.graph_passes.region import PassReport, RegionGraph, insert_call
from xllm_compile.runtime.ops.collectives import ALL_REDUCE, WAIT


def dual_stream(region: RegionGraph) -> PassReport:
    report = PassReport(name="dual_stream", region=region.name)
    inputs = [node for node in region.graph.find_nodes(op="placeholder") if node.name in ("delta_0", "delta_1")]
    if not inputs:
        is_split = any("micro_batch" in node.meta for node in region.graph.nodes)
        report.skip("takes no sum to wait for" if is_split else "not split into halves")
    elif not any(user.target is WAIT for node in inputs for user in node.users):
        _wait_for_inputs(region, inputs)
        _return_unwaited(region)
        _interleave(region)
        report.matches += 1
    for node in region.graph.nodes:
        node.meta["stream"] = int(node.target is ALL_REDUCE)
    region.finish()
    return report


def _wait_for_inputs(region: RegionGraph, inputs: list[fx.Node]) -> None:
    for half, node in zip(HALVES, inputs, strict=True):
        readers = list(node.users)
        first = next(each for each in region.graph.nodes if each in node.users)
        waited = insert_call(region.graph, first, WAIT, node)
        waited.meta["micro_batch"] = half
        for reader in readers:
            # The number of tokens is known without waiting.
            if reader.target is not torch.ops.aten.sym_size.int:
                reader.replace_input_with(node, waited)


def _return_unwaited(region: RegionGraph) -> None:
    output = region.graph.output_node()
    for wait in list(output.all_input_nodes):
        started = wait.args[0] if wait.target is WAIT else None
        if isinstance(started, fx.Node) and started.target is ALL_REDUCE and len(wait.users) == 1:
            output.replace_input_with(wait, started)
            region.graph.erase_node(wait)


def _interleave(region: RegionGraph) -> None:
    region.graph.eliminate_dead_code()
    calls = [node for node in region.graph.nodes if node.op == "call_function"]
    if not any(node.target is ALL_REDUCE for node in calls):
        return  # The head: it needs both halves at once.
    shared = [node for node in calls if node.meta.get("micro_batch") is None]
    parts = [_parts([node for node in calls if node.meta.get("micro_batch") == half]) for half in HALVES]
    alternating = [node for pair in zip(*parts, strict=True) for part in pair for node in part]
    for node in [*shared, *alternating]:
        region.graph.output_node().prepend(node)


def _parts(nodes: list[fx.Node]) -> list[list[fx.Node]]:
    """Cut after each start of a collective."""
    parts: list[list[fx.Node]] = [[]]
    for node in nodes:
        parts[-1].append(node)
        if node.target is ALL_REDUCE:
            parts.append([])
    return parts
