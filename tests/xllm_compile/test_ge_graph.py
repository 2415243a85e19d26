from dataclasses import replace

import pytest
import torch

from tests.graph_passes.regions import family_config, layer_graph
from xllm_compile.graph_passes.pipeline import npu_pipeline, run_passes
from xllm_compile.targets.npu.compile_region import planned_ops
from xllm_compile.targets.npu.ge_graph import GeGraphError, GeOp, PlannedOp, check_graph

LABELLED = {"stream": "1", "cube_cores": "8", "vector_cores": "16"}
PLAN = [
    PlannedOp(type="ScatterNdUpdate"),
    PlannedOp(type="FusedInferAttentionScore"),
    PlannedOp(type="MatMul", **LABELLED),
    PlannedOp(type="MatMul"),
]


def graph():
    """A cache that is written, viewed and read, and two products, one of them on a stream of its own."""
    return [
        GeOp(name="cache", type="RefData"),
        GeOp(name="x", type="Data"),
        GeOp(name="write", type="ScatterNdUpdate", inputs=("cache:0", "x:0", "x:0")),
        GeOp(name="view", type="Reshape", inputs=("write:0", "Const:0")),
        GeOp(name="attend", type="FusedInferAttentionScore", inputs=("x:0", "view:0", "view:0", "", "x:0")),
        GeOp(name="one", type="MatMul", inputs=("attend:0", "x:0", ""), **LABELLED),
        GeOp(name="two", type="MatMul", inputs=("attend:0", "x:0", "")),
        GeOp(name="out", type="NetOutput", inputs=("one:0", "two:0", "write:-1")),
    ]


def changed(name, **values):
    return [replace(op, **values) if op.name == name else op for op in graph()]


def refused(ops, message):
    with pytest.raises(GeGraphError, match=message):
        check_graph("layer", ops, PLAN, ["cache"])


def test_the_planned_graph_passes():
    check_graph("layer", graph(), PLAN, ["cache"])


def test_a_missing_stream_label():
    refused(changed("one", stream=None), "planned 1 x MatMul on stream '1' with 8 cube and 16 vector cores, .* has 0")


@pytest.mark.parametrize("limit", ["cube_cores", "vector_cores"])
def test_a_missing_or_wrong_core_limit(limit):
    refused(changed("one", **{limit: None}), "the passes planned")
    refused(changed("one", **{limit: "24"}), "the passes planned")


def test_a_fused_operator_that_is_not_there_or_there_twice():
    refused([op for op in graph() if op.name != "two"], "planned 1 x MatMul on the main stream, the GE graph has 0")
    refused([*graph(), GeOp(name="three", type="MatMul")], "planned 1 x MatMul on the main stream, the GE graph has 2")


def test_a_label_that_no_pass_planned():
    refused(changed("view", stream="2"), "view is Reshape on stream '2', which no pass planned")


def test_a_write_through_a_view():
    ops = [*graph()[:2], GeOp(name="early", type="Reshape", inputs=("cache:0", "Const:0")), *graph()[2:]]
    index = next(i for i, op in enumerate(ops) if op.name == "write")
    ops[index] = replace(ops[index], inputs=("early:0", "x:0", "x:0"))
    refused(ops, "write writes cache through early: the whole cache is copied")


@pytest.mark.parametrize("kind", ["TensorMove", "Identity", "Assign", "Cast", "Transpose"])
def test_a_copy_of_the_cache(kind):
    ops = graph()
    refused([*ops[:3], GeOp(name="copy", type=kind, inputs=("cache:0",)), *ops[3:]], f"{kind} copy copies the whole of")
    refused([*ops[:4], GeOp(name="copy", type=kind, inputs=("view:0",)), *ops[4:]], f"{kind} copy copies the whole of")


def test_a_cache_returned_written_twice_never_or_lost():
    refused(changed("out", inputs=("one:0", "write:0")), "NetOutput out copies the whole of cache")
    second = GeOp(name="again", type="ScatterNdUpdate", inputs=("cache:0", "x:0", "x:0"))
    check = [PlannedOp(type="MatMul", **LABELLED), PlannedOp(type="MatMul")]
    with pytest.raises(GeGraphError, match="written 2 times, planned is once"):
        check_graph("layer", [*graph()[:-1], second], check, ["cache"])
    with pytest.raises(GeGraphError, match="written 0 times"):
        check_graph("layer", changed("write", inputs=("x:0", "x:0", "x:0")), PLAN, ["cache"])
    refused(changed("cache", type="Data"), "cache is Data, not RefData: the write would be lost")
    refused([op for op in graph() if op.name != "cache"], "has no input cache")


def test_the_plan_of_a_lowered_layer():
    region = layer_graph(family_config("qwen3"), torch.bfloat16)
    passes = npu_pipeline(max_model_len=256)
    run_passes(region, passes[:-1])
    (silu,) = region.graph.find_nodes(op="call_function", target=torch.ops.xllm.silu_mul.default)
    silu.meta |= {"stream": "1", "core_share": {"cube": 8, "vector": 16}}
    run_passes(region, passes[-1:])
    plan = planned_ops(region.graph)
    assert [op.type for op in plan].count("MatMul") == 4
    assert [op for op in plan if op.stream is not None] == [PlannedOp(type="SwiGlu", **LABELLED)]
