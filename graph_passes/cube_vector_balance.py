"""Cores of either unit for branches that run side by side, so that they end together and neither unit waits.

Matches: branches of a region that can run side by side: those that earlier passes put on different streams or, where
    nothing has a stream yet, what hangs beside the longest path, with the stretch of the path it is independent of.
Rewrites: nothing but notes: meta["core_share"] = {"cube": x, "vector": y} on a branch's nodes (1 of a unit it has no
    work for: limits must be positive), and meta["stream"] where nothing had one. Where operators that take all cores
    of their units in turn are planned to end sooner, the streams only. What the notes mean is up to the target: limits
    of a stream's cores, green contexts.
Targets: the NPU's pipeline only. A CPU's cores are of one kind: each does products and token-wise work alike, and a
    layer of a dense decoder, its products merged, is a chain with nothing beside its longest path. What could run side
    by side are two parts of a step, each on a share of the threads. Up to eight cores no shares are planned to beat
    taking turns (``xllm-bench balance``, benchmarks/thread_shares.py). Beyond, where a few cores take all of the
    memory's bandwidth, some are: that is what several instances on shares of the cores do, with no second way through a
    step.
Skips: a branch that everything else waits for, or that waits for everything else; branches that wait for collectives
    (their cores would idle meanwhile); more branches than cores; a plan that is no shorter than taking turns with all
    cores, as it is where every operator makes use of all of them.
Numerics: bitwise; the graph stays as it is.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import fx

from xllm_compile.graph_passes.core_balance import Branch, balance_cores
from xllm_compile.graph_passes.cost_model import CostModel, NodeCost
from xllm_compile.graph_passes.node_cost import region_costs
from xllm_compile.graph_passes.region import PassReport, RegionGraph
from xllm_compile.graph_passes.step_shape import StepShape
from xllm_compile.graph_passes.timeline import MAIN_STREAM, makespan, schedule

# A plan must promise more than the cost model can err on ratios of like work.
_LEAST_GAIN = 0.005
# What a branch on a stream of its own costs: an event where it leaves the others, and one where they meet again.
_EVENTS = 2

Costs = dict[fx.Node, NodeCost]


def cube_vector_balance(region: RegionGraph, model: CostModel, step: StepShape) -> PassReport:
    """Balance every group of concurrent branches for a step of this shape."""
    report = PassReport(name="cube_vector_balance", region=region.name)
    costs = dict(region_costs(region, step))
    for branches in concurrent_branches(costs, model):
        if _match(branches, costs, report):
            report.matches += _rewrite(branches, costs, model, report, label=f"{region.name}.{report.matches}")
    return report


def concurrent_branches(costs: Costs, model: CostModel) -> list[list[list[fx.Node]]]:
    """Groups of branches that can run side by side, nodes in graph order, the main branch of each group first.

    The main line is the longest path by time, or the stream with most work where streams are given. What else there is
    makes side branches: other streams, or what is connected beside the path. Beside a side branch runs the stretch of
    the main line that some node of it is independent of; side branches over common stretches make one group.
    """
    before = _ancestors(list(costs))
    if any(node.meta.get("stream") for node in costs):
        lines = sorted(_by_stream(costs), key=lambda nodes: model.total_seconds(costs[n] for n in nodes), reverse=True)
        main, sides = lines[0], lines[1:]
    else:
        main = _longest_path(costs, model)
        sides = _components([node for node in costs if node not in set(main)], costs)
    groups: list[tuple[set[fx.Node], list[list[fx.Node]]]] = []
    for side in sides:
        timed = [node for node in side if costs[node].launches]
        stretch = {
            node
            for node in main
            if costs[node].launches and any(node not in before[other] and other not in before[node] for other in timed)
        }
        common = [group for group in groups if group[0] & stretch]
        groups = [group for group in groups if group not in common]
        merged = [branch for _, branches in common for branch in branches]
        groups.append((stretch.union(*(nodes for nodes, _ in common)), [*merged, side]))
    return [
        [[node for node in main if node in stretch], *branches] if stretch else branches for stretch, branches in groups
    ]


def _longest_path(costs: Costs, model: CostModel) -> list[fx.Node]:
    best: dict[fx.Node, tuple[float, fx.Node | None]] = {}
    for node, cost in costs.items():
        ends = [(best[source][0], source) for source in node.all_input_nodes if source in best]
        longest, source = max(ends, key=lambda end: end[0]) if ends else (0.0, None)
        best[node] = (longest + model.seconds(cost), source)
    at: fx.Node | None = max(best, key=lambda node: best[node][0]) if best else None
    path = []
    while at is not None:
        path.append(at)
        at = best[at][1]
    return path[::-1]


def _ancestors(nodes: Sequence[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
    found: dict[fx.Node, set[fx.Node]] = {}
    for node in nodes:
        found[node] = set()
        for source in node.all_input_nodes:
            if source in found:
                found[node] |= found[source] | {source}
    return found


def _components(nodes: Sequence[fx.Node], costs: Costs) -> list[list[fx.Node]]:
    """What is connected by edges among ``nodes``, in graph order.

    A node that takes no time joins its sources' branch, and begins none: two readers of one view are still apart.
    """
    branch: dict[fx.Node, set[fx.Node]] = {}
    for node in nodes:
        parts = [branch[source] for source in node.all_input_nodes if source in branch]
        if parts or costs[node].launches:
            whole = {node}.union(*parts)
            branch.update(dict.fromkeys(whole, whole))
    found = {id(members): members for members in branch.values()}
    return [[node for node in nodes if node in members] for members in found.values()]


def _by_stream(nodes: Iterable[fx.Node]) -> list[list[fx.Node]]:
    found: dict[str, list[fx.Node]] = {}
    for node in nodes:
        found.setdefault(node.meta.get("stream") or MAIN_STREAM, []).append(node)
    return list(found.values())


def _match(branches: Sequence[Sequence[fx.Node]], costs: Costs, report: PassReport) -> bool:
    if any("core_share" in node.meta for branch in branches for node in branch):
        return False
    if len(branches) < 2:
        report.skip("nothing independent beside a branch")
        return False
    if any(costs[node].unit == "communication" and costs[node].launches for branch in branches for node in branch):
        report.skip("a branch waits for a collective")
        return False
    return True


def _rewrite(
    branches: Sequence[Sequence[fx.Node]], costs: Costs, model: CostModel, report: PassReport, label: str
) -> bool:
    """Whether a plan was worth its notes; without, the nodes are as they were."""
    work = [_branch(str(index), nodes, costs, model) for index, nodes in enumerate(branches)]
    try:
        balanced = balance_cores(work, model.spec.cores["cube"], model.spec.cores["vector"])
    except ValueError:
        report.skip("more branches than cores")
        return False
    members = {node for branch in branches for node in branch}
    here = [(node, cost) for node, cost in costs.items() if node in members]

    def planned() -> float:
        return makespan(schedule(here, model))

    in_turns = planned()
    if not any(node.meta.get("stream") for node in members):
        named = [node for branch in branches[1:] for node in branch]
        for index, branch in enumerate(branches[1:], 1):
            for node in branch:
                node.meta["stream"] = f"{label}.{index}"
    else:
        named = []
    crossing_s = _EVENTS * model.spec.launch_s * (len(branches) - 1) if named else 0.0
    side_by_side = planned() + crossing_s
    for branch, (cube, vector) in zip(branches, balanced.cores, strict=True):
        for node in branch:
            node.meta["core_share"] = {"cube": max(1, cube), "vector": max(1, vector)}
    shared = planned() + crossing_s
    if shared < min(in_turns, side_by_side) * (1 - _LEAST_GAIN):
        return True
    for node in members:
        del node.meta["core_share"]
    report.skip("taking turns with all cores is as fast")
    if named and side_by_side < in_turns * (1 - _LEAST_GAIN):
        return True
    for node in named:
        del node.meta["stream"]
    return False


def _branch(name: str, nodes: Sequence[fx.Node], costs: Costs, model: CostModel) -> Branch:
    """Launches and copies take as long on any number of cores."""
    fixed = sum(costs[node].launches * model.spec.launch_s for node in nodes)
    times: dict[str, tuple[float, ...]] = {}
    for unit in ("cube", "vector"):
        work = [replace(costs[node], launches=0) for node in nodes if costs[node].unit == unit and costs[node].launches]
        if work:
            cores = model.spec.cores[unit]
            times[unit] = tuple(sum(model.seconds(cost, x / cores) for cost in work) for x in range(1, cores + 1))
    fixed += model.total_seconds(replace(costs[node], launches=0) for node in nodes if costs[node].unit == "copy")
    return Branch(name=name, cube_s=times.get("cube", ()), vector_s=times.get("vector", ()), fixed_s=fixed)
