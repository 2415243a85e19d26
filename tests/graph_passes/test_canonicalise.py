import pytest
import torch

from tests.graph_passes.regions import (
    DTYPES,
    apply,
    assert_finds_nothing,
    assert_same_outputs,
    assert_untouched,
    region_graph,
)
from xllm_compile.graph_passes.canonicalise import canonicalise


def redundant(inputs, weights):
    x = inputs["x"].contiguous().clone().view(-1, 6)
    y = torch.ops.aten.detach(x.to(x.dtype)) * 2
    return (y.reshape(y.shape).expand(-1, 6) + 1,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 7])
def test_fires_and_changes_no_value(dtype, rows):
    before, after = (region_graph(redundant, {"x": ("T", 6)}, dtype=dtype) for _ in range(2))
    report = apply(canonicalise, after)
    assert report.matches == 7 and before.op_counts()["aten.clone.default"] == 1
    assert after.op_counts() == {"aten.add.Tensor": 1, "aten.mul.Tensor": 1}
    assert_same_outputs(before, after, {"x": torch.randn(rows, 6).to(dtype)})
    assert_finds_nothing(canonicalise, after)


def test_views_and_casts_that_change_something_stay():
    def changing(inputs, weights):
        return (inputs["x"].view(-1, 2, 3).to(torch.float64).expand(-1, 2, 3),)

    region = region_graph(changing, {"x": ("T", 6)})
    apply(canonicalise, region)
    assert region.op_counts() == {"aten.to.dtype": 1, "aten.view.default": 1}
    assert_finds_nothing(canonicalise, region)


def test_a_copy_of_what_is_written_later_stays():
    def keeps_the_old(inputs, weights):
        old = inputs["kv_cache"].clone()
        k = inputs["k"]
        torch.ops.xllm.kv_write(k, k, inputs["kv_cache"], inputs["positions"], inputs["seq_start"], inputs["slot"])
        return (old + 0,)

    region = region_graph(
        keeps_the_old,
        {"k": ("T", 1, 2), "kv_cache": ("L", "M", 2, 1, 2)},
        int_inputs={"positions": ("T",), "seq_start": ("S1",), "slot": ("S",)},
    )
    assert_untouched(canonicalise, region, "copy of a value that is written")
