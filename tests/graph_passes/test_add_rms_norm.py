import pytest
import torch

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
from xllm_compile.graph_passes.add_rms_norm import add_rms_norm


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fires_on_a_layer_and_changes_no_value(family, dtype):
    config = family_config(family)
    before, after = layer_graph(config, dtype), layer_graph(config, dtype)
    # The sum of what the previous layer returned, and the sum after attention.
    assert apply(add_rms_norm, after).matches == 2
    norms = before.op_counts()["xllm.rms_norm.default"]
    assert after.op_counts().get("xllm.rms_norm.default", 0) == norms - 2
    assert after.op_counts()["xllm.add_rms_norm.default"] == 2
    assert "aten.add.Tensor" not in after.op_counts()
    for step in (MIXED, SINGLE):
        assert_same_outputs(before, after, layer_inputs(config, dtype, step))
    assert_finds_nothing(add_rms_norm, after)


def normed(add):
    def function(inputs, weights):
        total = add(inputs["x"], inputs["y"])
        return torch.ops.xllm.rms_norm(total, weights["w"], 1e-5), total * 2

    return function


def graph(add, y=("T", 6), dtype=torch.float32):
    return region_graph(normed(add), {"x": ("T", 6), "y": y}, {"w": (6,)}, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_readers_of_the_sum_keep_it(dtype):
    before, after = (graph(torch.add, dtype=dtype) for _ in range(2))
    assert apply(add_rms_norm, after).matches == 1
    assert after.op_counts() == {"aten.mul.Tensor": 1, "xllm.add_rms_norm.default": 1}
    torch.manual_seed(0)
    inputs = {name: torch.randn(5, 6).to(dtype) for name in "xy"}
    assert_same_outputs(before, after, inputs)


@pytest.mark.parametrize(
    ("region", "reasons"),
    [
        (lambda: graph(lambda x, y: torch.add(x, y, alpha=2)), ["scaled add"]),
        (lambda: graph(torch.add, y=(6,)), ["broadcasting add"]),
        (lambda: graph(lambda x, y: x + 1.0), ["broadcasting add"]),
        (lambda: graph(lambda x, y: x.to(torch.float64) + y), ["operands of two dtypes"]),
        (lambda: graph(torch.sub), []),
    ],
)
def test_near_misses_stay(region, reasons):
    assert_untouched(add_rms_norm, region(), *reasons)
