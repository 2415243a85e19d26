import pytest
import torch

from tests.graph_passes.npu_emulation import run_lowered
from tests.graph_passes.regions import apply, assert_finds_nothing, assert_untouched, make_weight, region_graph
from xllm_compile.graph_passes.all_reduce_rms_norm import all_reduce_rms_norm
from xllm_compile.runtime.ops.collectives import ALL_REDUCE, WAIT

xllm = torch.ops.xllm


def layer(dtype=torch.bfloat16, *, bias=False, residual_first=True, is_read_twice=False, kind="sum", has_product=True):
    """o_proj, its sum, and the norm after it."""

    def function(inputs, weights):
        x = inputs["x"]
        product = torch.nn.functional.linear(x, weights["w"], weights.get("b")) if has_product else x + x
        total = WAIT(ALL_REDUCE(product, kind, "tp"))
        pair = (inputs["residual"], total) if residual_first else (total, inputs["residual"])
        normed, added = xllm.add_rms_norm(*pair, weights["norm"], 1e-6)
        return normed, added, *([total * 2] if is_read_twice else [])

    weights = {"norm": (6,), **({"w": (6, 4)} if has_product else {}), **({"b": (6,)} if bias else {})}
    inputs = {"x": ("T", 4 if has_product else 6), "residual": ("T", 6)}
    return region_graph(function, inputs, weights, dtype=dtype)


@pytest.mark.parametrize("residual_first", [True, False])
def test_product_sum_add_and_norm_become_one(residual_first):
    region = layer(residual_first=residual_first)
    assert apply(all_reduce_rms_norm, region).matches == 1
    counts = region.op_counts()
    assert counts == {"aten.view.default": 3, "xllm_npu.mm_all_reduce_add_rms_norm.default": 1}
    assert_finds_nothing(all_reduce_rms_norm, region)


def test_it_computes_what_the_parts_do():
    """One rank, whose sum is its own part."""
    region = layer()
    apply(all_reduce_rms_norm, region)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        name: torch.randn(5, columns, generator=generator).bfloat16() for name, columns in (("x", 4), ("residual", 6))
    }
    found = run_lowered(region, inputs)
    w, norm = (make_weight(region.weights[f"w_{name}"], 0) for name in ("w", "norm"))
    total = inputs["x"] @ w.t() + inputs["residual"]
    normed = total * torch.rsqrt(total.double().square().mean(-1, keepdim=True) + 1e-6) * norm
    torch.testing.assert_close(found["1"], total)
    torch.testing.assert_close(found["0"], normed.bfloat16(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bias": True}, "product with a bias, or no sum"),
        ({"kind": "max"}, "product with a bias, or no sum"),
        ({"dtype": torch.float32}, "float32 product"),
        ({"is_read_twice": True}, "sum is read elsewhere too"),
        ({"has_product": False}, "sum of no product"),
    ],
)
def test_near_misses_stay(options, reason):
    assert_untouched(all_reduce_rms_norm, layer(**options), reason)


def test_a_sum_on_a_stream_of_its_own_stays():
    region = layer()
    (started,) = region.graph.find_nodes(op="call_function", target=ALL_REDUCE)
    started.meta["stream"] = 1
    assert_untouched(all_reduce_rms_norm, region, "sum overlaps computation")
