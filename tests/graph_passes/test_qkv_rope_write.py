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
from xllm_compile.graph_passes.merge_linear import merge_linear
from xllm_compile.graph_passes.qkv_rope_write import qkv_rope_write

H, K, D = 4, 2, 6
XLLM = torch.ops.xllm


def merged_layer(config, dtype):
    region = layer_graph(config, dtype)
    merge_linear(region)
    return region


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fires_on_a_layer_and_changes_no_value(family, dtype):
    config = family_config(family)
    before, after = merged_layer(config, dtype), merged_layer(config, dtype)
    assert apply(qkv_rope_write, after).matches == 1
    counts = {name: (before.op_counts().get(name, 0), after.op_counts().get(name, 0)) for name in before.op_counts()}
    assert counts["xllm.kv_write.default"] == (1, 0)
    assert counts["xllm.rope.default"] == (2, 0)
    head_norms = 2 if family == "qwen3" else 0
    assert counts["xllm.rms_norm.default"] == (2 + head_norms, 2)
    assert after.op_counts()["xllm.qkv_rope_write.default"] == 1
    for step in (MIXED, SINGLE):
        assert_same_outputs(before, after, layer_inputs(config, dtype, step, padding=3))
    assert_finds_nothing(qkv_rope_write, after)


def attention_block(
    *,
    between=lambda k: k,
    query=lambda q, rope: rope(q),
    value=lambda v, rope: v,
    key_eps=1e-6,
    norm_whole=False,
    order=(0, 1, 2),
    axis=-1,
    from_two=False,
    is_read=True,
):
    """q, k, v of one product through norm, rope and cache; each option changes one thing."""

    def function(inputs, weights):
        def rope(x):
            return XLLM.rope(x, inputs["cos"], inputs["sin"])

        product = inputs["product"]
        if axis == 0:
            product = product.view(H + 2 * K, -1)
        parts = torch.ops.aten.split_with_sizes(product, [H * D, K * D, K * D] if axis else [H, K, K], axis)
        q, k, v = (parts[i] for i in order)
        if norm_whole:
            q, k = XLLM.rms_norm(q, weights["wq"], 1e-6), XLLM.rms_norm(k, weights["wk"], 1e-6)
        heads = [x.view(-1, n, D) for x, n in ((q, H), (k, K), (v, K))]
        q, k, v = heads
        if from_two:
            v = (inputs["product"] * 2)[:, -K * D :].view(-1, K, D)
        if not norm_whole:
            q, k = XLLM.rms_norm(q, weights["q"], 1e-6), XLLM.rms_norm(k, weights["k"], key_eps)
        q, k, v = query(q, rope), between(rope(k)), value(v, rope)
        cache, metadata = inputs["kv_cache"], [inputs[name] for name in ("seq_start", "context_len", "slot")]
        XLLM.kv_write(k, v, cache, inputs["positions"], inputs["seq_start"], inputs["slot"])
        return (XLLM.attention(q, cache, *metadata, 0.4, 0) if is_read else q * 1,)

    return region_graph(
        function,
        {
            "product": ("T", (H + 2 * K) * D),
            "cos": ("T", D // 2),
            "sin": ("T", D // 2),
            "kv_cache": ("L", "M", 2, K, D),
        },
        {"q": (D,), "k": (D,), "wq": (H * D,), "wk": (K * D,)},
        int_inputs={"positions": ("T",), "seq_start": ("S1",), "context_len": ("S",), "slot": ("S",)},
    )


def test_the_plain_block_is_one():
    assert apply(qkv_rope_write, attention_block()).matches == 1


UNKNOWN = "an unknown operator between product and cache"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"between": lambda k: k * 2}, UNKNOWN),
        ({"query": lambda q, rope: rope(rope(q))}, UNKNOWN),
        ({"query": lambda q, rope: q * 1}, UNKNOWN),
        # The norm of the whole projection before it is cut into heads, as Olmo 2 has it.
        ({"norm_whole": True}, UNKNOWN),
        ({"query": lambda q, rope: q}, "rope is not on q and k alone"),
        ({"value": lambda v, rope: rope(v)}, "rope is not on q and k alone"),
        ({"key_eps": 1e-5}, "head norms differ in eps"),
        ({"order": (0, 2, 1)}, "q, k and v are not parts of one product"),
        ({"from_two": True}, UNKNOWN),
        ({"is_read": False}, "no attention reads the cache that is written"),
    ],
)
def test_near_misses_stay(options, reason):
    assert_untouched(qkv_rope_write, attention_block(**options), reason)
