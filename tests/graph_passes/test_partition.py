import pytest
import torch

from tests.graph_passes.regions import (
    DTYPES,
    MIXED,
    SINGLE,
    family_config,
    head_graph,
    layer_graph,
    layer_inputs,
    region_graph,
    run_graph,
)
from xllm_compile.graph_passes.partition import partition
from xllm_compile.graph_passes.pipeline import cpu_pipeline, run_passes
from xllm_compile.graph_passes.verify import verify_graph

xllm = torch.ops.xllm


def run_pieces(pieces, inputs):
    """Run the pieces as the runner does: each one's outputs are the next one's leading inputs."""
    state = [inputs["delta"], inputs["residual"]]
    values = {name: value.clone() for name, value in inputs.items()}
    for piece in pieces:
        leading = [spec.name for spec in piece.inputs[: len(state)]]
        found = run_graph(piece, values | dict(zip(leading, state, strict=True)))
        values["kv_cache"] = found["kv_cache"]
        state = [found[str(index)] for index in range(len(args_of_output(piece)))]
    return state, values["kv_cache"]


def args_of_output(piece):
    return piece.graph.output_node().args[0]


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_passes", [False, True])
def test_pieces_compute_what_the_layer_does(family, dtype, has_passes):
    config = family_config(family)
    whole, cut = layer_graph(config, dtype), layer_graph(config, dtype)
    if has_passes:
        for region in (whole, cut):
            run_passes(region, cpu_pipeline())
    pieces, report = partition(cut)
    assert (report.matches, report.skips) == (1, {})
    assert [piece.name for piece in pieces] == [f"{cut.name}.0", f"{cut.name}.1.attention", f"{cut.name}.2"]
    before, attention, after = (piece.op_counts() for piece in pieces)
    assert attention == {"xllm.attention.default": 1}
    assert "xllm.attention.default" not in before | after
    assert sum(map(sum, (piece.values() for piece in (before, attention, after)))) == sum(whole.op_counts().values())
    for piece in (pieces[0], pieces[2]):
        verify_graph(piece, after="partition")
    for step in (MIXED, SINGLE):
        inputs = layer_inputs(config, dtype, step, padding=2)
        expected = run_graph(whole, inputs)
        state, kv_cache = run_pieces(pieces, inputs)
        for index, value in enumerate(state):
            assert torch.equal(value, expected[str(index)])
        assert torch.equal(kv_cache, expected["kv_cache"])


def test_each_weight_goes_to_the_piece_that_reads_it():
    region = layer_graph(family_config("qwen3"))
    weights = dict(region.weights)
    pieces, _ = partition(region)
    assert pieces[1].weights == {}
    assert {**pieces[0].weights, **pieces[2].weights} == weights
    assert not pieces[0].weights.keys() & pieces[2].weights.keys()


def test_a_second_run_finds_nothing_in_the_compiled_pieces():
    for piece in partition(layer_graph(family_config("qwen3")))[0][::2]:
        code = piece.module.code
        (same,), report = partition(piece)
        assert same is piece and report.matches == 0 and not report.skips
        assert piece.module.code == code


def test_a_region_without_attention_stays():
    region = head_graph(family_config("qwen3"))
    pieces, report = partition(region)
    assert pieces == [region] and report.matches == 0 and not report.skips


KV = {"kv_cache": ("L", "M", 2, 2, 8)}
INTS = {"seq_start": ("S1",), "context_len": ("S",), "slot": ("S",)}


def attend(q, inputs):
    return xllm.attention(q, inputs["kv_cache"], inputs["seq_start"], inputs["context_len"], inputs["slot"], 1.0, 0)


def size_of_its_own(inputs, weights):
    doubled = torch.cat([inputs["q"], inputs["q"]])
    return attend(inputs["q"] * 2, inputs) + doubled.sum(0), doubled * 2


def unread(inputs, weights):
    # The input is needed after attention, and not before.
    return attend(inputs["x"] * 2, inputs) + inputs["q"], inputs["x"] + 1


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (size_of_its_own, "a value of a computed size crosses the cut"),
        (unread, "a value passes through a compiled piece"),
    ],
)
def test_near_misses_stay_whole(function, reason):
    inputs = {"q": ("T", 4, 8), "x": ("T", 4, 8), **KV}
    region = region_graph(function, inputs, int_inputs=INTS)
    code = region.module.code
    pieces, report = partition(region)
    assert pieces == [region] and report.matches == 0 and report.skips == {reason: 1}
    assert region.module.code == code
