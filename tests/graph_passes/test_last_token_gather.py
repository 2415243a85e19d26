import pytest
import torch
import torch.nn.functional as F

from tests.graph_passes.regions import (
    DTYPES,
    apply,
    assert_finds_nothing,
    assert_same_outputs,
    assert_untouched,
    family_config,
    head_graph,
    region_graph,
)
from xllm_compile.graph_passes.canonicalise import canonicalise
from xllm_compile.graph_passes.last_token_gather import last_token_gather


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [[0], [6, 0, 3], [2, 2]])
def test_fires_on_the_head_and_changes_no_value(dtype, rows):
    config = family_config("llama", vocab_size=45)
    before, after = head_graph(config, dtype), head_graph(config, dtype)
    # The size assertions that export leaves behind read every value; canonicalise, which comes first, drops them.
    canonicalise(after)
    counts = after.op_counts()
    assert apply(last_token_gather, after).matches == 1
    # The gather moved up to the region's inputs; nothing else is added.
    assert after.op_counts() == {**counts, "aten.index_select.default": 2}
    gathers = after.graph.find_nodes(op="call_function", target=torch.ops.aten.index_select.default)
    assert {node.args[0].name for node in gathers} == {"delta", "residual"}
    torch.manual_seed(0)
    inputs = {
        "delta": torch.randn(7, config.hidden_size).to(dtype),
        "residual": torch.randn(7, config.hidden_size).to(dtype),
        "logits_at": torch.tensor(rows, dtype=torch.int32),
    }
    assert_same_outputs(before, after, inputs)
    assert_finds_nothing(last_token_gather, after)


def gather(function):
    return region_graph(
        lambda inputs, weights: function(inputs["x"], weights["w"], inputs["at"]),
        {"x": ("T", 6)},
        {"w": (6, 6)},
        name="head",
        int_inputs={"at": ("R",)},
    )


def two_readers(x, w, at):
    y = F.linear(x, w)
    return y.index_select(0, at), y * 2


@pytest.mark.parametrize(
    "function",
    [
        two_readers,
        lambda x, w, at: (F.linear(x, w).index_select(1, at),),
        lambda x, w, at: (F.linear(x, w).softmax(0).index_select(0, at),),
        lambda x, w, at: (x.index_select(0, at),),
    ],
)
def test_near_misses_stay(function):
    assert_untouched(last_token_gather, gather(function))


def test_the_chain_stops_at_the_last_operator_that_mixes_rows():
    def function(x, w, at):
        return (F.linear(x.cumsum(0), w).index_select(0, at),)

    before, after = gather(function), gather(function)
    assert apply(last_token_gather, after).matches == 1
    inputs = {"x": torch.randn(5, 6), "at": torch.tensor([4, 1], dtype=torch.int32)}
    assert_same_outputs(before, after, inputs)
