"""When each node of a region is planned to run, by the cost model: one list per unit, idle time, a trace to look at.

A node starts when its inputs are there, the node before it on its stream has ended, and its unit has the cores it
asks for: all of them, or those of ``meta["core_share"]``. Nodes without ``meta["stream"]`` share one stream, in order.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from xllm_compile.graph_passes.cost_model import CostModel, NodeCost
from xllm_compile.graph_passes.device_spec import UNITS, DeviceSpec
from xllm_compile.graph_passes.node_cost import region_costs
from xllm_compile.graph_passes.region import RegionGraph
from xllm_compile.graph_passes.step_shape import StepShape

MAIN_STREAM = "main"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedNode:
    name: str
    operator: str
    unit: str
    stream: str
    cores: int
    """Of its unit; 1 of communication and copy, which are not divided."""
    busy_cores: float
    """Those that find work, on average."""
    start_s: float
    end_s: float


def unit_cores(spec: DeviceSpec) -> dict[str, int]:
    return {unit: spec.cores.get(unit, 1) for unit in UNITS}


def plan_timeline(region: RegionGraph, model: CostModel, step: StepShape) -> list[PlannedNode]:
    """Every node that takes time, by start. Greedy: of the streams' next nodes the one that can start first."""
    return schedule(region_costs(region, step), model)


def schedule(costs: Sequence[tuple[fx.Node, NodeCost]], model: CostModel) -> list[PlannedNode]:
    """As plan_timeline, of costs already known, in graph order."""
    capacity = unit_cores(model.spec)
    queues: dict[str, deque[tuple[fx.Node, NodeCost]]] = {}
    for node, cost in costs:
        queues.setdefault(str(node.meta.get("stream") or MAIN_STREAM), deque()).append((node, cost))
    ends: dict[fx.Node, float] = {}
    to_come = {node for node, _ in costs}
    stream_free = dict.fromkeys(queues, 0.0)
    placed: dict[str, list[tuple[float, float, int]]] = {unit: [] for unit in UNITS}
    planned: list[PlannedNode] = []
    while to_come:
        heads = []
        for stream, queue in queues.items():
            if queue and not any(source in to_come for source in queue[0][0].all_input_nodes):
                node, cost = queue[0]
                ready = max([stream_free[stream], *(ends.get(source, 0.0) for source in node.all_input_nodes)])
                cores = _cores_of(node, cost, capacity)
                seconds = model.seconds(cost, cores / capacity[cost.unit])
                begin = _first_fit(placed[cost.unit], ready, seconds, cores, capacity[cost.unit])
                heads.append((begin, stream, node, cost, cores, seconds))
        # The graph is in topological order, so its first node that is still to come heads its stream and is ready.
        start, stream, node, cost, cores, seconds = min(heads, key=lambda head: head[0])
        queues[stream].popleft()
        to_come.remove(node)
        ends[node] = stream_free[stream] = start + seconds
        if seconds:
            placed[cost.unit].append((start, start + seconds, cores))
            planned.append(
                PlannedNode(
                    name=node.name,
                    operator=str(node.target),
                    unit=cost.unit,
                    stream=stream,
                    cores=cores,
                    busy_cores=model.at_work(cost, cores / capacity[cost.unit]) * capacity[cost.unit],
                    start_s=start,
                    end_s=start + seconds,
                )
            )
    return sorted(planned, key=lambda entry: entry.start_s)


def _cores_of(node: fx.Node, cost: NodeCost, capacity: Mapping[str, int]) -> int:
    share = node.meta.get("core_share") or {}
    return int(share.get(cost.unit) or capacity[cost.unit])


def _first_fit(
    placed: Sequence[tuple[float, float, int]], ready: float, seconds: float, cores: int, all_: int
) -> float:
    """The first moment from ``ready`` on when ``cores`` are free for that long."""
    if not seconds:
        return ready
    for start in sorted({ready, *(end for _, end, _ in placed if end > ready)}):
        overlapping = [entry for entry in placed if entry[0] < start + seconds and entry[1] > start]
        # Usage changes only where something begins: look there and at the start itself.
        moments = {start, *(begin for begin, _, _ in overlapping if begin > start)}
        if all(sum(c for b, e, c in overlapping if b <= at < e) + cores <= all_ for at in moments):
            return start
    raise AssertionError("after the last end everything is free")


def makespan(planned: Sequence[PlannedNode]) -> float:
    return max((entry.end_s for entry in planned), default=0.0)


def idle_share(planned: Sequence[PlannedNode], spec: DeviceSpec) -> dict[str, float]:
    """Of cube and vector: the share of core-seconds, up to the end of the last node, that find no work."""
    total = makespan(planned)
    shares = {}
    for unit in ("cube", "vector"):
        busy = sum((entry.end_s - entry.start_s) * entry.busy_cores for entry in planned if entry.unit == unit)
        shares[unit] = 1 - busy / (total * spec.cores[unit]) if total else 0.0
    return shares


def chrome_trace(planned: Sequence[PlannedNode], name: str) -> dict[str, Any]:
    """For chrome://tracing and Perfetto: one process a region, one thread a unit and stream; microseconds."""
    lanes = sorted({(UNITS.index(entry.unit), entry.stream) for entry in planned})
    thread = {lane: index for index, lane in enumerate(lanes, 1)}
    events: list[dict[str, Any]] = [{"name": "process_name", "ph": "M", "pid": 1, "tid": 0, "args": {"name": name}}]
    for (unit, stream), tid in thread.items():
        label = {"name": f"{UNITS[unit]}: {stream}"}
        events.append({"name": "thread_name", "ph": "M", "pid": 1, "tid": tid, "args": label})
    for entry in planned:
        events.append(
            {
                "name": entry.name,
                "cat": entry.unit,
                "ph": "X",
                "pid": 1,
                "tid": thread[UNITS.index(entry.unit), entry.stream],
                "ts": entry.start_s * 1e6,
                "dur": (entry.end_s - entry.start_s) * 1e6,
                "args": {"operator": entry.operator, "cores": entry.cores},
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ns"}
