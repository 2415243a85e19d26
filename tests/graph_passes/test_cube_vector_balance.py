"""Branches found, cores noted, and the timeline that says whether it was worth it."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from tests.graph_passes.regions import apply, assert_same_outputs, family_config, layer_graph, region_graph
from xllm_compile.benchmarks.planned_models import deepseek_v3_layer, two_micro_batches
from xllm_compile.graph_passes.cost_model import CostModel
from xllm_compile.graph_passes.cube_vector_balance import concurrent_branches, cube_vector_balance
from xllm_compile.graph_passes.device_spec import DeviceSpec, Efficiency, device_spec
from xllm_compile.graph_passes.node_cost import region_costs
from xllm_compile.graph_passes.pipeline import cpu_pipeline, run_passes
from xllm_compile.graph_passes.step_shape import StepShape
from xllm_compile.graph_passes.timeline import chrome_trace, idle_share, makespan, plan_timeline

SPEC = DeviceSpec(
    name="small",
    sources={},
    cores={"cube": 8, "vector": 8},
    core_flops={"cube": {"float32": 1e6}, "vector": {"float32": 1e6}},
    memory_bytes_per_s=1e15,
    cache_bytes=1 << 40,
    cache_bytes_per_s=1e15,
    link_bytes_per_s=1e6,
    link_latency_s=0.0,
    launch_s=0.0,
    efficiency={"linear": Efficiency(tile_rows=16, tile_columns=16)},
)
MODEL = CostModel(spec=SPEC)
STEP = StepShape.of(16)


def two_products(inputs, weights):
    """One product of six tiles and one of two: together they fill eight cores, in turns each leaves some idle."""
    wide, narrow = F.linear(inputs["x"], weights["wide"]), F.linear(inputs["x"], weights["narrow"])
    return (F.linear(torch.cat((wide, narrow), dim=-1), weights["out"]),)


WEIGHTS = {"wide": (96, 32), "narrow": (32, 32), "out": (128, 128)}


def branching(**changes):
    return region_graph(two_products, {"x": ("T", 32)}, {**WEIGHTS, **changes})


def balance(region, model=MODEL, step=STEP):
    return apply(lambda graph: cube_vector_balance(graph, model, step), region)


def notes(region):
    return {
        n.name: (n.meta.get("stream"), n.meta.get("core_share")) for n in region.graph.nodes if n.op != "placeholder"
    }


def test_branches_get_the_cores_they_can_use():
    before, region = branching(), branching()
    alone = plan_timeline(region, MODEL, STEP)
    report = balance(region)
    assert (report.matches, report.skips) == (1, {})
    linear, linear_1, *_ = (node for node in region.graph.nodes if node.op == "call_function")
    assert linear.meta["core_share"]["cube"] == 6 and linear_1.meta["core_share"]["cube"] == 2
    assert "stream" not in linear.meta and linear_1.meta["stream"] == "layer.0.1"
    assert "core_share" not in notes(region)["linear_2"]
    planned = plan_timeline(region, MODEL, STEP)
    # Two rounds of one tile each become one.
    assert makespan(planned) < makespan(alone)
    assert idle_share(planned, SPEC)["cube"] < idle_share(alone, SPEC)["cube"]
    assert before.module.code == region.module.code
    assert_same_outputs(before, region, {"x": torch.randn(5, 32)})


def test_a_second_run_finds_nothing():
    region = branching()
    balance(region)
    found = notes(region)
    assert balance(region).matches == 0 and notes(region) == found


def test_streams_that_are_there_are_kept():
    region = branching()
    narrow = [node for node in region.graph.nodes if node.op == "call_function"][1]
    narrow.meta["stream"] = "side"
    assert balance(region).matches == 1
    assert narrow.meta["stream"] == "side" and narrow.meta["core_share"]["cube"] == 2


def test_where_everything_divides_evenly_turns_are_as_fast():
    even = CostModel(spec=replace(SPEC, efficiency={}))
    region = branching()
    report = balance(region, even)
    assert report.matches == 0 and report.skips == {"taking turns with all cores is as fast": 1}
    assert set(notes(region).values()) == {(None, None)}


def test_different_units_need_no_shares():
    def layer(inputs, weights):
        return (F.linear(inputs["x"], weights["w"]) + inputs["x"].exp()[:, :2],)

    region = region_graph(layer, {"x": ("T", 32)}, {"w": (2, 32)})
    alone = makespan(plan_timeline(region, MODEL, STEP))
    assert balance(region).matches == 1
    assert {stream for stream, _ in notes(region).values()} == {None, "layer.0.1"}
    assert makespan(plan_timeline(region, MODEL, STEP)) < alone


def test_a_chain_and_a_collective_are_left_alone():
    def chain(inputs, weights):
        return (F.linear(F.linear(inputs["x"], weights["a"]), weights["a"]),)

    region = region_graph(chain, {"x": ("T", 32)}, {"a": (32, 32)})
    report = balance(region)
    assert report.matches == 0 and report.skips == {}

    def reduced(inputs, weights):
        total = torch.ops._c10d_functional.all_reduce(F.linear(inputs["x"], weights["wide"]), "sum", "0")
        other = F.linear(inputs["x"], weights["narrow"])
        return torch.ops._c10d_functional.wait_tensor(total), other

    region = region_graph(reduced, {"x": ("T", 32)}, {k: WEIGHTS[k] for k in ("wide", "narrow")})
    report = balance(region, step=StepShape.of(16, world_size=2))
    assert report.matches == 0 and report.skips == {"a branch waits for a collective": 1}
    assert set(notes(region).values()) == {(None, None)}


def test_more_branches_than_cores():
    one = CostModel(spec=replace(SPEC, cores={"cube": 1, "vector": 1}))
    report = balance(branching(), one)
    assert report.matches == 0 and report.skips == {"more branches than cores": 1}


def test_a_timeline_obeys_inputs_streams_and_cores():
    region = two_micro_batches(passed_layer())
    planned = plan_timeline(
        region, CostModel(spec=device_spec("ascend-910b2")), StepShape.of(64, sequences=2, context=99)
    )
    ends = {entry.name: entry.end_s for entry in planned}
    starts = {entry.name: entry.start_s for entry in planned}
    for node in region.graph.nodes:
        for source in node.all_input_nodes:
            if node.name in starts and source.name in ends:
                assert starts[node.name] >= ends[source.name]
    for stream in ("half0", "half1"):
        lane = [entry for entry in planned if entry.stream == stream]
        assert lane and all(a.end_s <= b.start_s for a, b in pairwise(lane))
    for at in starts.values():
        for unit, cores in (("cube", 24), ("vector", 48)):
            assert sum(e.cores for e in planned if e.unit == unit and e.start_s <= at < e.end_s) <= cores


def passed_layer():
    region = layer_graph(family_config("qwen3"))
    run_passes(region, cpu_pipeline())
    return region


def test_one_stream_is_one_after_the_other():
    region, model = passed_layer(), CostModel(spec=device_spec("h200"))
    planned = plan_timeline(region, model, STEP)
    assert [a.end_s for a in planned[:-1]] == [b.start_s for b in planned[1:]]
    idle = idle_share(planned, model.spec)
    assert all(0 < share < 1 for share in idle.values())
    assert idle_share([], model.spec) == {"cube": 0.0, "vector": 0.0}


def test_a_trace_is_what_perfetto_reads():
    region = branching()
    balance(region)
    planned = plan_timeline(region, MODEL, STEP)
    trace = json.loads(json.dumps(chrome_trace(planned, "layer")))
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(slices) == len(planned) and all(event["dur"] > 0 and event["ts"] >= 0 for event in slices)
    names = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert {names[event["tid"]] for event in slices} == {"cube: main", "cube: layer.0.1", "copy: main"}


def test_the_deepseek_shaped_layer_is_balanced():
    model, step = CostModel(spec=device_spec("ascend-910b2")), StepShape.of(64, sequences=64, context=4096, logits=32)
    region = deepseek_v3_layer()
    alone = plan_timeline(region, model, step)
    report = balance(region, model, step)
    planned = plan_timeline(region, model, step)
    assert report.matches == 2 and makespan(planned) < makespan(alone)
    assert idle_share(planned, model.spec)["cube"] < idle_share(alone, model.spec)["cube"]
    shared = {node.meta.get("stream") for node in region.graph.nodes if "shared" in str(node.args)}
    assert shared and None not in shared
    for stream in {node.meta.get("stream") for node in region.graph.nodes}:
        assert len({str(n.meta.get("core_share")) for n in region.graph.nodes if n.meta.get("stream") == stream}) <= 2


@pytest.mark.parametrize("tile", [{"tile_rows": 1}, {"tile_columns": -1}])
def test_tiles_have_two_sides(tile):
    with pytest.raises(ValueError, match="tile_rows"):
        Efficiency(**tile)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_a_layer_lowered_for_the_cpu_is_a_chain(family):
    """Why there is no lowering of balanced branches to threads: nothing in it could run beside its longest path."""
    region, model = layer_graph(family_config(family)), CostModel(spec=device_spec("cpu-avx512"))
    run_passes(region, cpu_pipeline())
    assert concurrent_branches(dict(region_costs(region, StepShape.of(8))), model) == []
