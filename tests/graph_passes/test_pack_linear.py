from functools import partial

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
    embed_graph,
    family_config,
    head_graph,
    layer_graph,
    layer_inputs,
    region_graph,
)
from xllm_compile.graph_passes.canonicalise import canonicalise
from xllm_compile.graph_passes.last_token_gather import last_token_gather
from xllm_compile.graph_passes.pack_linear import pack_linear
from xllm_compile.models.decoder import EMBED_WEIGHT

# float32: another order of summation. bfloat16: the sums round to neighbours (2^-8), in each operator after the other.
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fires_on_a_layer(family, dtype):
    config = family_config(family)
    before, after = layer_graph(config, dtype), layer_graph(config, dtype)
    assert apply(pack_linear, after).matches == before.op_counts()["aten.linear.default"] == 7
    assert after.op_counts()["xllm.packed_linear.default"] == 7
    assert "aten.linear.default" not in after.op_counts()
    assert sum(spec.is_packed for spec in after.weights.values()) == 7
    for step in (MIXED, SINGLE):
        assert_same_outputs(before, after, layer_inputs(config, dtype, step), **TOLERANCE[dtype])
    assert_finds_nothing(pack_linear, after)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_head_writes_float32_itself(dtype):
    config = family_config("qwen3", vocab_size=45)
    before, after = head_graph(config, dtype), head_graph(config, dtype)
    for region in (before, after):
        canonicalise(region)
        last_token_gather(region)
    assert apply(pack_linear, after).matches == 1
    assert after.op_counts() == {
        "aten.add.Tensor": 1,
        "aten.index_select.default": 2,
        "xllm.packed_linear.default": 1,
        "xllm.rms_norm.default": 1,
    }
    torch.manual_seed(0)
    inputs = {
        "delta": torch.randn(7, config.hidden_size).to(dtype),
        "residual": torch.randn(7, config.hidden_size).to(dtype),
        "logits_at": torch.tensor([6, 0, 3], dtype=torch.int32),
    }
    assert_same_outputs(before, after, inputs, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tied_embedding_reads_the_heads_layout(dtype):
    config = family_config("qwen3", vocab_size=45)
    before, after = embed_graph(config, dtype), embed_graph(config, dtype)
    tied = partial(pack_linear, tied_weights=frozenset({EMBED_WEIGHT}))
    assert apply(tied, after).matches == 1
    assert "aten.embedding.default" not in after.op_counts()
    assert after.op_counts()["xllm.packed_embedding.default"] == 1
    head = head_graph(config, dtype)
    apply(tied, head)
    of_head = [spec for spec in head.weights.values() if spec.name == EMBED_WEIGHT]
    assert of_head == [spec for spec in after.weights.values() if spec.name == EMBED_WEIGHT]
    ids = torch.tensor([0, 44, 31, 32, 7], dtype=torch.int32)
    assert_same_outputs(before, after, {"token_ids": ids, "positions": ids, "rope_len": ids + 1})
    assert_finds_nothing(tied, after)


def near_miss(function):
    shapes = {"a": (5, 6), "b": (6,)}
    return region_graph(function, {"x": ("T", 6)}, shapes, int_inputs={"ids": ("T",)})


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda i, w: (F.linear(i["x"], w["a"] * 2),), "weight is computed or shared"),
        (lambda i, w: (F.linear(i["x"], w["a"]), w["a"] + 1), "weight is computed or shared"),
        (lambda i, w: (F.embedding(i["ids"], w["a"]),), "embedding is not tied"),
    ],
)
def test_near_misses_stay(function, reason):
    assert_untouched(pack_linear, near_miss(function), reason)


def test_a_cast_among_other_readers_stays():
    def function(inputs, weights):
        y = F.linear(inputs["x"], weights["a"], weights["c"])
        return y.float(), y * 2

    def make():
        return region_graph(function, {"x": ("T", 6)}, {"a": (5, 6), "c": (5,)}, dtype=torch.bfloat16)

    before, after = make(), make()
    assert apply(pack_linear, after).matches == 1
    assert after.op_counts()["aten.to.dtype"] == 1
    inputs = {"x": torch.randn(3, 6).to(torch.bfloat16)}
    assert_same_outputs(before, after, inputs, **TOLERANCE[torch.bfloat16])
