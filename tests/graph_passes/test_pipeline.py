"""The pass list as a whole: order, options, what is required, and the final programs of one model per family."""

from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch

from tests.graph_passes.regions import (
    DTYPES,
    MIXED,
    assert_same_outputs,
    family_config,
    family_regions,
    layer_graph,
    layer_inputs,
    region_graph,
)
from xllm_compile.capture import emit_program
from xllm_compile.graph_passes.pipeline import (
    Pass,
    PassError,
    RequiredPassError,
    cpu_pipeline,
    npu_pipeline,
    run_passes,
    split_pipeline,
)
from xllm_compile.graph_passes.quantisation import Quantisation
from xllm_compile.graph_passes.region import PassReport
from xllm_compile.graph_passes.verify import GraphVerificationError
from xllm_compile.models.decoder import EMBED_WEIGHT, build_regions

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ["qwen2", "qwen3", "llama"]
NAMES = [
    "canonicalise",
    "merge_linear",
    "qkv_rope_write",
    "silu_mul",
    "last_token_gather",
    "add_rms_norm",
    "pack_linear",
]


def tied(config):
    return frozenset({EMBED_WEIGHT}) if config.tie_word_embeddings else frozenset()


def final_programs(config, dtype, passes, world_size=1):
    programs = []
    graphs, regions = family_regions(config, dtype, world_size), build_regions(config, world_size)
    for graph, region in zip(graphs, regions, strict=True):
        run_passes(graph, passes)
        programs.append(emit_program(graph, region.layers))
    return programs


def golden_passes(config, variant):
    if variant == "npu":
        return npu_pipeline(max_model_len=256)
    if variant == "halves":
        return [*cpu_pipeline(tied_weights=tied(config)), *split_pipeline()]
    quantisation = Quantisation(scheme=variant) if variant else None
    return cpu_pipeline(tied_weights=tied(config), quantisation=quantisation)


@pytest.mark.parametrize(
    ("family", "variant"), [*product(FAMILIES, [None, "npu"]), ("qwen3", "int8"), ("qwen3", "halves")]
)
def test_golden_programs(family, variant, request):
    """A change of a pass, a model or torch's export shows here as a diff to read.

    Accept it with: pytest tests/graph_passes/test_pipeline.py --update-golden
    """
    lines = []
    config = family_config(family)
    world_size = 2 if variant == "halves" else 1
    for program in final_programs(config, torch.float32, golden_passes(config, variant), world_size):
        lines.append(f"== {program.name}, layers {list(program.layers)}")
        lines += [f"input  {spec.name}: {spec.dtype}{list(spec.shape)}" for spec in program.inputs]
        for spec in program.weights:
            packed = " packed" if spec.is_packed else ""
            lines.append(f"weight {spec.name}: {spec.dtype}{list(spec.shape)}{packed} <- {', '.join(spec.sources)}")
        lines += ["", program.code]
    text = "\n".join(line.rstrip() for line in "\n".join(lines).splitlines()) + "\n"
    path = GOLDEN / f"{family}{f'-{variant}' if variant else ''}.txt"
    if request.config.getoption("--update-golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


def test_order_and_names():
    assert [step.name for step in cpu_pipeline()] == NAMES
    assert all(step.summary for step in cpu_pipeline())


def test_disabled_passes_are_left_out():
    left = [step.name for step in cpu_pipeline(disabled=frozenset({"silu_mul", "add_rms_norm"}))]
    assert left == [name for name in NAMES if name not in ("silu_mul", "add_rms_norm")]
    with pytest.raises(ValueError, match=r"'silu'.*silu_mul"):
        cpu_pipeline(disabled=frozenset({"silu"}))
    for name in ("merge_linear", "qkv_rope_write", "last_token_gather", "pack_linear"):
        with pytest.raises(ValueError, match=f"'{name}' cannot be left out"):
            cpu_pipeline(disabled=frozenset({name}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("disabled", [frozenset(), frozenset({"canonicalise", "silu_mul", "add_rms_norm"})])
def test_a_layer_after_all_passes_gives_what_it_gave(family, dtype, disabled):
    config = family_config(family)
    before, after = layer_graph(config, dtype), layer_graph(config, dtype)
    reports = run_passes(after, cpu_pipeline(disabled=disabled))
    assert {report.name for report in reports if report.matches} >= {"merge_linear", "qkv_rope_write", "pack_linear"}
    # float32: order of summation. bfloat16: each of a few operators in a row rounds to a neighbour (2^-8).
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 4e-2, "atol": 4e-2}
    assert_same_outputs(before, after, layer_inputs(config, dtype, MIXED, padding=2), **tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_pass_finds_nothing_the_second_time(family):
    config = family_config(family)
    passes = cpu_pipeline(tied_weights=tied(config))
    for region in family_regions(config, torch.float32):
        run_passes(region, passes)
        code = region.module.code
        assert [step.name for step in passes if step.run(region).matches] == []
        assert region.module.code == code


def test_a_required_pass_that_matches_nothing_is_an_error():
    region = region_graph(lambda inputs, weights: (inputs["x"] + 1,), {"x": ("T", 6)})
    with pytest.raises(RequiredPassError, match="merge_linear matched nothing in region layer"):
        run_passes(region, cpu_pipeline())


def test_a_pass_that_breaks_the_graph_is_named():
    def breaks(region):
        region.graph.output_node().args = ((region.placeholder("residual"),),)
        return PassReport(name="breaks", region=region.name)

    (first, *_) = cpu_pipeline()
    with pytest.raises(GraphVerificationError, match="after breaks"):
        run_passes(layer_graph(family_config("llama")), [first, replace(first, name="breaks", run=breaks)])


def test_a_pass_that_raises_names_itself_the_region_and_the_node():
    def stumbles(region):
        for node in region.graph.find_nodes(op="call_function", target=torch.ops.aten.silu.default):
            raise KeyError(f"no rule for {node.target}")
        return PassReport(name="stumbles", region=region.name)

    region = layer_graph(family_config("qwen3"))
    step = Pass(name="stumbles", run=stumbles, summary="")
    with pytest.raises(PassError, match=r"pass stumbles failed in region layer at node %silu.*KeyError") as error:
        run_passes(region, [step])
    assert isinstance(error.value.__cause__, KeyError)
    assert str(error.value).endswith("leave it out with --disable-pass stumbles")
    # Of what would be refused nobody is told to try it.
    with pytest.raises(PassError, match="nothing can be built without it"):
        run_passes(region, [replace(step, required_in="layer")])


def test_the_report_counts_operators_before_and_after_each_pass():
    region = layer_graph(family_config("qwen3"))
    first, *_, last = reports = run_passes(region, cpu_pipeline())
    for earlier, later in pairwise(reports):
        assert earlier.ops_after == later.ops_before
    assert first.ops_before["aten.linear.default"] == 7
    assert last.ops_after == region.op_counts()
    assert last.program == region.module.code.strip()
