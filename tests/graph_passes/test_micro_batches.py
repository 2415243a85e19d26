"""Splitting a step in halves, and ordering the halves around their collectives.

A process group of one rank stands for the others: its sum is its own part, which changes nothing that is compared.
"""

from collections.abc import Iterator

import pytest
import torch

from tests.graph_passes.regions import (
    MIXED,
    apply,
    assert_finds_nothing,
    assert_untouched,
    family_config,
    family_regions,
    layer_graph,
    layer_inputs,
    region_graph,
    run_graph,
)
from xllm_compile.graph_passes.dual_stream import dual_stream
from xllm_compile.graph_passes.micro_batch_split import micro_batch_split, split_sizes
from xllm_compile.graph_passes.pipeline import cpu_pipeline, run_passes
from xllm_compile.graph_passes.quantisation import SCHEMES, Quantisation
from xllm_compile.graph_passes.verify import GraphVerificationError, verify_graph
from xllm_compile.runtime.ops.collectives import ALL_REDUCE, WAIT
from xllm_compile.runtime.tensor_parallel import RankConfig, RankGroup

# A cut inside the second of three sequences, inside the only one, between two; odd and even, with and without padding.
STEPS = {
    "mixed": (MIXED, 0),
    "mixed, padded": (MIXED, 3),
    "two tokens": (((1, 5), (1, 8)), 0),
    "one odd prefill": (((7, 0),), 0),
    "one chunk of a prefill": (((6, 3),), 1),
    "more padding than tokens": (((1, 4),), 4),
    "decodes": (((1, 1), (1, 2), (1, 7)), 0),
}


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    ranks = RankGroup(RankConfig(rank=0, world_size=1))
    ranks.connect()
    yield
    ranks.close()


def regions(config, quantisation=None):
    """Those of two ranks, after the passes of the CPU target."""
    graphs = family_regions(config, torch.float32, 2)
    for graph in graphs:
        run_passes(graph, cpu_pipeline(quantisation=quantisation))
    return graphs


def rank_inputs(config, step, padding):
    inputs = layer_inputs(config, torch.float32, step, padding)
    inputs["kv_cache"] = inputs["kv_cache"][:, :, :, : config.num_kv_heads // 2].contiguous()
    return inputs


def halved(inputs):
    """The inputs of a split region."""
    sizes = list(split_sizes(len(inputs["delta"])).values())
    out = {name: value for name, value in inputs.items() if name not in ("delta", "residual")}
    for name in ("delta", "residual"):
        parts = inputs[name].split(sizes)
        out |= {f"{name}_{half}": part.clone() for half, part in enumerate(parts)}
    return out


def assert_same_as_unsplit(before, after, inputs):
    expected = run_graph(before, inputs, on_kernels=True)
    found = run_graph(after, halved(inputs), on_kernels=True)
    for index in (0, 1):
        parts = [torch.ops._c10d_functional.wait_tensor(found[str(2 * index + half)]) for half in (0, 1)]
        torch.testing.assert_close(torch.cat(parts), expected[str(index)], rtol=0, atol=0)
    torch.testing.assert_close(found["kv_cache"], expected["kv_cache"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("family", "name"), [("qwen2", "mixed"), ("llama", "mixed, padded"), *(("qwen3", name) for name in STEPS)]
)
def test_a_layer_gives_bitwise_what_it_gave(family, name, kernels):
    config = family_config(family, num_key_value_heads=2)
    step, padding = STEPS[name]
    before, after = (regions(config)[1] for _ in range(2))
    assert apply(micro_batch_split, after).matches == 1
    inputs = rank_inputs(config, step, padding)
    assert_same_as_unsplit(before, after, inputs)
    assert apply(dual_stream, after).matches == 1
    assert_same_as_unsplit(before, after, inputs)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantised_layer_gives_bitwise_what_it_gave(scheme, kernels):
    config = family_config("qwen3", hidden_size=96, intermediate_size=128, head_dim=32)
    before, after = (regions(config, Quantisation(scheme=scheme))[1] for _ in range(2))
    assert sum(count for name, count in after.op_counts().items() if name.startswith("xllm.int")) == 4
    assert apply(micro_batch_split, after).matches == apply(dual_stream, after).matches == 1
    assert_same_as_unsplit(before, after, rank_inputs(config, MIXED, 3))


def test_the_halves_of_a_layer_alternate():
    graph = regions(family_config("qwen3"))[1]
    before = graph.op_counts()
    assert apply(micro_batch_split, graph).matches == 1
    for name, count in before.items():
        assert graph.op_counts()[name] >= 2 * count
    assert apply(dual_stream, graph).matches == 1
    order = [
        ("start" if node.target is ALL_REDUCE else "wait", node.meta["micro_batch"], node.meta["stream"])
        for node in graph.graph.nodes
        if node.target in (ALL_REDUCE, WAIT)
    ]
    expected = [("wait", 0, 0), ("start", 0, 1), ("wait", 1, 0), ("start", 1, 1)]
    assert order == expected * 2
    # What is between a start and its wait does not read it, and the last sums are left to the next region.
    outputs = graph.graph.output_node().args[0]
    assert [node.target is ALL_REDUCE for node in outputs] == [True, True, False, False]
    assert [spec.name for spec in graph.inputs][:4] == ["delta_0", "delta_1", "residual_0", "residual_1"]
    assert_finds_nothing(micro_batch_split, graph)
    assert_finds_nothing(dual_stream, graph)


def test_embed_cuts_and_head_joins():
    config = family_config("qwen3")
    embed, _, head = regions(config)
    for graph in (embed, head):
        assert apply(micro_batch_split, graph).matches == 1
        report = apply(dual_stream, graph)
        assert report.skips == ({"takes no sum to wait for": 1} if graph is embed else {})
        assert_finds_nothing(micro_batch_split, graph)
        assert_finds_nothing(dual_stream, graph)
    outputs = [node.meta.get("micro_batch") for node in embed.graph.output_node().args[0]]
    assert outputs == [0, 1, 0, 1, None, None]
    assert [spec.shape[0] for spec in head.inputs] == ["TA", "TB", "TA", "TB", "R"]
    # The head waits for both sums before it reads either.
    assert head.op_counts()[str(WAIT)] == 2


def test_a_layer_without_collectives_stays():
    assert_untouched(micro_batch_split, layer_graph(family_config("qwen3")), "no collective to hide")
    assert_untouched(dual_stream, layer_graph(family_config("qwen3")), "not split into halves")


def test_an_operator_over_tokens_stays():
    def function(inputs, weights):
        started = ALL_REDUCE(inputs["delta"].cumsum(0), "sum", "tp")
        return WAIT(started), inputs["residual"] + 1.0

    region = region_graph(function, {"delta": ("T", 6), "residual": ("T", 6)})
    assert_untouched(micro_batch_split, region, "aten.cumsum.default is not known to treat each token by itself")


def test_reading_a_sum_on_its_way_is_refused():
    graph = regions(family_config("qwen3"))[1]
    apply(micro_batch_split, graph)
    wait = next(node for node in graph.graph.nodes if node.target is WAIT)
    wait.replace_all_uses_with(wait.args[0])
    graph.graph.erase_node(wait)
    with pytest.raises(GraphVerificationError, match="before it is waited for"):
        verify_graph(graph, after="planted fault")


def test_writing_the_cache_ahead_of_the_first_half_is_refused():
    graph = regions(family_config("qwen3"))[1]
    apply(micro_batch_split, graph)
    writes = [node for node in graph.graph.nodes if node.target is torch.ops.xllm.qkv_rope_write.default]
    for node in writes:
        node.meta["micro_batch"] = 1 - node.meta["micro_batch"]
    with pytest.raises(GraphVerificationError, match="cache"):
        verify_graph(graph, after="planted fault")
