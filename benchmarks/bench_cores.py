"""How steps get quicker with cores, planned: to a server's 64, and over two NUMA nodes. Arithmetic only.

A step takes what the cost model says, of kernels that deal outputs in tiles and read weights once, and what it takes to
start and end each kernel on all cores. That grows with them: each core claims its share from one cache line and reports
its end in another (``runtime/ops/cpu/parallel.cpp``), and a line goes from core to core one at a time.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from xllm_compile.benchmarks.console import finish, show_table
from xllm_compile.benchmarks.planned_models import planned_regions
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.simulation.chart import curves_chart, page
from xllm_compile.graph_passes.cost_model import CostModel
from xllm_compile.graph_passes.device_spec import DeviceSpec, cpu_device_spec
from xllm_compile.graph_passes.node_cost import step_seconds
from xllm_compile.graph_passes.region import RegionGraph
from xllm_compile.graph_passes.step_shape import StepShape

CORES = (1, 2, 4, 8, 16, 32, 64)
CASES = {
    "decode batch 1, context 128": StepShape.of(1, context=128),
    "decode batch 1, context 2048": StepShape.of(1, context=2048),
    "decode batch 32, context 128": StepShape.of(32, 32, context=128),
    "prefill 512": StepShape.of(512),
}
CORE_BYTES_PER_S = 39e9
"""Loads only, one core of the machines the built-in specs come from."""
LINE_S = 60e-9
"""Of a cache line from one core to another of the same socket, half of them on another die: public measurements of
servers give 30 to 110 ns."""
_LINES_PER_CORE = 2
NODE_LINK_BYTES_PER_S = 128e9
"""Between the sockets of a server, one direction: four links of 32 GB/s."""


def run_cores(results: Path, command: Sequence[str], *, models: Sequence[str]) -> None:
    """Plan, and write cpu_cores_planned.json and .html."""
    raw: dict[str, Any] = {"device_spec": server_spec(CORES[-1]).to_json(), "line_s": LINE_S, "models": {}}
    bars, rows, charts = [], [], []
    for name in models:
        regions = planned_regions(name)
        found = {case: {cores: _seconds(regions, step, cores) for cores in CORES} for case, step in CASES.items()}
        raw["models"][name] = {
            case: {str(cores): seconds for cores, seconds in times.items()} for case, times in found.items()
        }
        curves = {}
        for case, times in found.items():
            speed_up = {cores: times[CORES[0]] / seconds for cores, seconds in times.items()}
            curves[case] = [(float(cores), value) for cores, value in speed_up.items()]
            rows.append((name, case, *(f"{speed_up[cores]:.1f}" for cores in CORES)))
            bars.append(Bar(what=f"{name}, {case}: {CORES[-1]} cores against one", value=speed_up[CORES[-1]], unit="x"))
        charts.append(curves_chart(f"{name}: planned speed-up over one core", "cores", curves))
        nodes = two_nodes(regions)
        raw["models"][name]["two nodes"] = nodes
        bars += [Bar(what=f"{name}, two nodes of 32: {what}", value=rate, unit="tok/s") for what, rate in nodes.items()]
    show_table("Planned speed-up over one core", ("model", "step", *(f"{cores}" for cores in CORES)), rows)
    finish(make_record("cpu_cores_planned", command, seed=0, raw=raw, bars=bars), results)
    (results / "cpu_cores_planned.html").write_text(page(charts))


def server_spec(num_cores: int) -> DeviceSpec:
    """A socket of a server with AVX-512 and bf16; kernels as ours: rows by twelve, 32 columns, split no further."""
    spec = cpu_device_spec(("avx512_bf16",), num_cores)
    linear = replace(spec.efficiency["linear"], tile_rows=12, tile_columns=32)
    return replace(
        spec,
        name=f"server, {num_cores} cores",
        efficiency={**spec.efficiency, "linear": linear},
        core_bytes_per_s=CORE_BYTES_PER_S,
        memory_bytes_per_s=min(num_cores * CORE_BYTES_PER_S, spec.most_bytes_per_s or float("inf")),
        launch_s=spec.launch_s + max(0, num_cores - 2) * _LINES_PER_CORE * LINE_S,
    )


def two_nodes(regions: Sequence[tuple[RegionGraph, int]]) -> dict[str, float]:
    """Tokens per second of decode at batch 1 on two nodes of 32 cores, by where the weights are.

    One process: each half of the cores reads half of the weights. What is not on its own node comes over the link, at
    the same time as what is, and the slower of the two counts.
    """
    step, half = StepShape.of(1, context=128), CORES[-1] // 2
    here = server_spec(half)
    both = server_spec(CORES[-1])
    own = here.memory_bytes_per_s
    rates = {
        # Of the whole, per second, by both halves together.
        "weights on one node": 2 * min(own / 2, NODE_LINK_BYTES_PER_S),
        "weights interleaved": 2 * min(own, 2 * NODE_LINK_BYTES_PER_S),
    }
    found = {
        what: 1 / step_seconds(regions, step, CostModel(spec=replace(both, memory_bytes_per_s=rate)))
        for what, rate in rates.items()
    }
    found["an instance on each node"] = 2 / step_seconds(regions, step, CostModel(spec=here))
    return found


def _seconds(regions: Sequence[tuple[RegionGraph, int]], step: StepShape, num_cores: int) -> float:
    return step_seconds(regions, step, CostModel(spec=server_spec(num_cores)))
