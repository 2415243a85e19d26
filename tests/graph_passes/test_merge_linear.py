import pytest
import torch
import torch.nn.functional as F

from tests.graph_passes.regions import (
    DTYPES,
    MIXED,
    SINGLE,
    apply,
    assert_finds_nothing,
    assert_same_outputs,
    assert_untouched,
    family_config,
    layer_graph,
    layer_inputs,
    region_graph,
)
from xllm_compile.graph_passes.merge_linear import merge_linear


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fires_on_a_layer_and_changes_no_value(family, dtype):
    config = family_config(family)
    before, after = layer_graph(config, dtype), layer_graph(config, dtype)
    assert apply(merge_linear, after).matches == 2
    assert before.op_counts()["aten.linear.default"] == 7
    assert after.op_counts()["aten.linear.default"] == 4
    assert after.op_counts()["aten.split_with_sizes.default"] == 2
    # Each output is the same dot product, but some matrix libraries order its sum by the size of the product.
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1.6e-2, "atol": 1e-2}
    for step in (MIXED, SINGLE):
        assert_same_outputs(before, after, layer_inputs(config, dtype, step, padding=2), **tolerance)
    assert_finds_nothing(merge_linear, after)


def test_merged_weights_name_their_sources_in_order():
    region = layer_graph(family_config("llama"))
    apply(merge_linear, region)
    merged = {spec.name: spec for spec in region.weights.values() if len(spec.sources) > 1}
    layer = "model.layers.{layer}."
    assert {name: spec.sources for name, spec in merged.items()} == {
        f"{layer}{scope}.{'+'.join(names)}.{kind}": tuple(f"{layer}{scope}.{name}.{kind}" for name in names)
        for scope, names in (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))
        for kind in ("weight", "bias")
    }
    assert merged[f"{layer}self_attn.q_proj+k_proj+v_proj.weight"].shape == ((4 + 2 + 2) * 32, 72)


SHAPES = {"m.a.weight": (5, 6), "m.b.weight": (3, 6), "m.c.bias": (3,)}


def shared(inputs, weights):
    x = inputs["x"]
    return F.linear(x, weights["m.a.weight"]) + F.linear(x, weights["m.b.weight"]).sum(), weights["m.a.weight"] * 2


def computed(inputs, weights):
    x = inputs["x"]
    return (F.linear(x, weights["m.a.weight"] * 2), F.linear(x, weights["m.b.weight"]))


def some_bias(inputs, weights):
    x = inputs["x"]
    return F.linear(x, weights["m.a.weight"]), F.linear(x, weights["m.b.weight"], weights["m.c.bias"])


def other_input(inputs, weights):
    x = inputs["x"]
    return F.linear(x, weights["m.a.weight"]), F.linear(x * 2, weights["m.b.weight"])


@pytest.mark.parametrize(
    ("function", "reasons"),
    [
        (shared, ["weight shared or not a plain weight"]),
        (computed, ["weight shared or not a plain weight"]),
        (some_bias, ["bias on some only"]),
        (other_input, []),
    ],
)
def test_near_misses_stay(function, reasons):
    assert_untouched(merge_linear, region_graph(function, {"x": ("T", 6)}, SHAPES), *reasons)


def test_three_of_different_sizes():
    def function(inputs, weights):
        x = inputs["x"]
        return tuple(F.linear(x, weights[f"m.{name}.weight"]) * 1 for name in "cab")

    shapes = {"m.a.weight": (5, 6), "m.b.weight": (1, 6), "m.c.weight": (33, 6)}
    before, after = (region_graph(function, {"x": ("T", 6)}, shapes) for _ in range(2))
    assert apply(merge_linear, after).matches == 1
    assert_same_outputs(before, after, {"x": torch.randn(3, 6)})
