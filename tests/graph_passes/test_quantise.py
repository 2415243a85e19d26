from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.graph_passes.regions import (
    DTYPES,
    MIXED,
    SINGLE,
    apply,
    assert_finds_nothing,
    assert_untouched,
    embed_graph,
    family_config,
    head_graph,
    layer_graph,
    layer_inputs,
    region_graph,
    run_graph,
)
from xllm_compile.graph_passes.canonicalise import canonicalise
from xllm_compile.graph_passes.last_token_gather import last_token_gather
from xllm_compile.graph_passes.merge_linear import merge_linear
from xllm_compile.graph_passes.pack_linear import pack_linear
from xllm_compile.graph_passes.pipeline import RequiredPassError, cpu_pipeline, run_passes
from xllm_compile.graph_passes.quantisation import SCHEMES, Quantisation
from xllm_compile.graph_passes.quantise import quantise
from xllm_compile.models.decoder import EMBED_WEIGHT
from xllm_compile.runtime.ops.quantised import quantise_int4, quantise_int8

# Every reduction axis is a multiple of 32.
SHAPE = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32}
OPERATORS = {scheme: f"{scheme.replace('-', '_')}_linear" for scheme in SCHEMES}
IN_HEAD = {scheme: scheme.replace("int4", "int8") for scheme in SCHEMES}
# Sums in another order.
TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
# Activations of a few hundred elements rounded to 1/127 of the largest.
DYNAMIC_ERROR = 0.02


def run(scheme, **options):
    return partial(quantise, quantisation=Quantisation(scheme=scheme, **options))


def rounded(scheme, group_size=32):
    """Stands in for run_graph's weights: the matrices as the scheme rounds them, in their own layout and dtype."""

    def change(spec, weight):
        if weight.dim() != 2 or spec.quantised:
            return weight
        if not scheme.startswith("int4"):
            values, scale = quantise_int8(weight)
            return (values * scale.unsqueeze(1)).to(weight.dtype)
        values, scale = quantise_int4(weight, group_size)
        return (values * scale.float().repeat_interleave(group_size, 1)).to(weight.dtype)

    return change


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_fires_on_a_layer_and_equals_eager_on_the_rounded_weights(family, scheme):
    config = family_config(family, **SHAPE)
    before, after = layer_graph(config), layer_graph(config)
    report = apply(run(scheme), after)
    assert (report.matches, report.skips) == (7, {})
    assert before.op_counts()["aten.linear.default"] == after.op_counts()[f"xllm.{OPERATORS[scheme]}.default"] == 7
    assert "aten.linear.default" not in after.op_counts()
    kinds = [spec.quantised for spec in after.weights.values() if spec.quantised]
    assert sorted(kinds) == [scheme[:4]] * 7 + [f"{scheme[:4]}.scale"] * 7
    for step in (MIXED, SINGLE):
        inputs = layer_inputs(config, torch.float32, step)
        expected, found = run_graph(before, inputs, change=rounded(scheme)), run_graph(after, inputs)
        for name, value in expected.items():
            if scheme.endswith("-dynamic") and value.is_floating_point():
                assert (found[name] - value).norm() <= DYNAMIC_ERROR * value.norm(), name
            else:
                torch.testing.assert_close(found[name], value, **TOLERANCE)
    assert_finds_nothing(run(scheme), after)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bfloat16(scheme):
    """Only x, the bias and the result are bfloat16: weights are rounded from the checkpoint's own dtype."""

    def function(inputs, weights):
        return (F.linear(inputs["x"], weights["a"], weights["b"]),)

    def make():
        return region_graph(function, {"x": ("T", 64)}, {"a": (40, 64), "b": (40,)}, dtype=torch.bfloat16)

    before, after = make(), make()
    assert apply(run(scheme), after).matches == 1
    assert after.weights["w_b"].dtype == "bfloat16"
    inputs = {"x": torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)}
    expected = run_graph(before, inputs, change=rounded(scheme))["0"].float()
    found = run_graph(after, inputs)["0"].float()
    assert (found - expected).norm() <= (0.1 if scheme.startswith("int4") else DYNAMIC_ERROR) * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_whole_pipeline_merges_first_and_packs_the_rest(scheme, dtype):
    config = family_config("qwen3", **SHAPE, tie_word_embeddings=False)
    layer, head = layer_graph(config, dtype), head_graph(config, dtype)
    passes = cpu_pipeline(quantisation=Quantisation(scheme=scheme))
    names = [step.name for step in passes]
    assert names.index("merge_linear") < names.index("quantise") < names.index("pack_linear")
    reports = {report.name: report for report in run_passes(layer, passes)}
    assert reports["quantise"].matches == layer.op_counts()[f"xllm.{OPERATORS[scheme]}.default"] == 4
    assert reports["pack_linear"].matches == 0
    reports = {report.name: report for report in run_passes(head, passes)}
    assert reports["quantise"].skips == {"head keeps its weight": 1}
    assert head.op_counts()["xllm.packed_linear.default"] == 1
    scales = [spec.name for spec in layer.weights.values() if spec.quantised.endswith(".scale")]
    assert "model.layers.{layer}.self_attn.q_proj+k_proj+v_proj.weight.scale" in scales


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_head_where_it_is_asked_for_writes_float32_itself(scheme):
    config = family_config("qwen3", **SHAPE, tie_word_embeddings=False, vocab_size=45)
    before, after = (head_graph(config, torch.float32) for _ in range(2))
    for region in (before, after):
        canonicalise(region)
        last_token_gather(region)
    assert apply(run(scheme, has_head=True), after).matches == 1
    assert after.op_counts()[f"xllm.{OPERATORS[IN_HEAD[scheme]]}.default"] == 1
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(7, config.hidden_size, generator=generator) for name in ("delta", "residual")}
    inputs["logits_at"] = torch.tensor([6, 0, 3], dtype=torch.int32)
    expected, found = run_graph(before, inputs, change=rounded(IN_HEAD[scheme]))["0"], run_graph(after, inputs)["0"]
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= (DYNAMIC_ERROR if scheme.endswith("-dynamic") else 1e-5) * expected.norm()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_tied_head_and_its_embedding_share_one_rounded_weight(scheme):
    config, tied = family_config("qwen3", **SHAPE, tie_word_embeddings=True), frozenset({EMBED_WEIGHT})
    before, embed, head = embed_graph(config), embed_graph(config), head_graph(config)
    passes = cpu_pipeline(tied_weights=tied, quantisation=Quantisation(scheme=scheme, has_head=True))
    for region in (embed, head):
        assert {report.name: report for report in run_passes(region, passes)}["quantise"].matches == 1
    assert head.op_counts()[f"xllm.{OPERATORS[IN_HEAD[scheme]]}.default"] == 1
    first, second = ({spec.name: spec for spec in region.weights.values()} for region in (embed, head))
    for name in (EMBED_WEIGHT, f"{EMBED_WEIGHT}.scale"):
        assert first[name] == second[name]
    inputs = {"token_ids": torch.tensor([3, 0, 31, 32, 3]), "positions": torch.arange(5, dtype=torch.int32)}
    inputs["rope_len"] = torch.full((5,), 5, dtype=torch.int32)
    expected, found = run_graph(before, inputs, change=rounded("int8"))["0"], run_graph(embed, inputs)["0"]
    assert torch.equal(found, expected)
    run_passes(before, cpu_pipeline(tied_weights=tied, quantisation=Quantisation(scheme=scheme)))
    assert before.op_counts()["xllm.packed_embedding.default"] == 1


def near_miss(function, outputs=40, inputs=40):
    shapes = {"a": (outputs, inputs)}
    return region_graph(function, {"x": ("T", inputs)}, shapes)


def plain(inputs, weights):
    return (F.linear(inputs["x"], weights["a"]),)


@pytest.mark.parametrize(
    ("region", "scheme", "reason"),
    [
        (near_miss(lambda i, w: (F.linear(i["x"], w["a"] * 2),)), "int8", "weight is computed or shared"),
        (near_miss(lambda i, w: (F.linear(i["x"], w["a"]), w["a"] + 1)), "int8", "weight is computed or shared"),
        (near_miss(plain, outputs=31), "int8-dynamic", "fewer than 32 outputs or inputs"),
        (near_miss(plain, inputs=24), "int8", "fewer than 32 outputs or inputs"),
        (near_miss(plain), "int4", "40 inputs are no multiple of the group of 32"),
    ],
)
def test_near_misses_stay(region, scheme, reason):
    assert_untouched(run(scheme), region, reason)


@pytest.mark.parametrize("scheme", ["int4", "int4-dynamic"])
def test_a_group_of_128(scheme):
    region = near_miss(plain, inputs=256)
    assert apply(run(scheme, group_size=128), region).matches == 1
    (scale,) = [spec for spec in region.weights.values() if spec.quantised == "int4.scale"]
    assert scale.shape == (2, 2, 32)


def test_a_layer_with_nothing_to_quantise_is_an_error():
    """Asked for int4, nobody wants the unquantised model instead."""
    config = family_config("qwen3", hidden_size=72, intermediate_size=100, head_dim=20)
    region = layer_graph(config)
    with pytest.raises(RequiredPassError, match=r"quantise matched nothing in region layer.*multiple of the group"):
        run_passes(region, cpu_pipeline(quantisation=Quantisation(scheme="int4")))


def test_what_is_packed_already_stays():
    region = near_miss(plain)
    apply(pack_linear, region)
    assert_untouched(run("int8"), region)


def test_merged_products_round_as_the_parts_do():
    config = family_config("llama", **SHAPE)
    merged, single = layer_graph(config), layer_graph(config)
    apply(merge_linear, merged)
    inputs = layer_inputs(config, torch.float32, MIXED)
    for region in (merged, single):
        apply(run("int8"), region)
    expected, found = run_graph(single, inputs), run_graph(merged, inputs)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **TOLERANCE)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scheme": "fp8"}, "'fp8' is not supported; supported: int8, int4, int8-dynamic, int4-dynamic"),
        ({"scheme": "int8", "group_size": 32}, "quantize-group=32 is for int4 and int4-dynamic only; int8 has"),
        ({"scheme": "int8-dynamic", "group_size": 128}, "quantize-group=128 is for int4 and int4-dynamic only"),
        ({"scheme": "int4", "group_size": 48}, "quantize-group=48 is not supported; supported: 32, 128"),
    ],
)
def test_bad_options(options, said):
    with pytest.raises(ValueError, match=said):
        Quantisation(**options)


def test_the_pass_is_switched_by_its_option_alone():
    assert "quantise" not in [step.name for step in cpu_pipeline(disabled=frozenset({"quantise"}))]
    with pytest.raises(ValueError, match=r"--quantize int8 asks for the pass 'quantise'; leave out one"):
        cpu_pipeline(disabled=frozenset({"quantise"}), quantisation=Quantisation(scheme="int8"))
