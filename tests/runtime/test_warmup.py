"""Warm-up: in which order graphs run before the first request, and that nothing of it stays."""

from typing import Any

import pytest
import torch

from tests.helpers import greedy
from tests.runtime.graphs import TIMES, compiled_runner, step_of
from xllm_compile.benchmarks.parity import random_prompts
from xllm_compile.runtime.graph_cache import GraphCache
from xllm_compile.runtime.instance import open_instance
from xllm_compile.runtime.instance_config import InstanceConfig
from xllm_compile.runtime.ops.spec import TensorSpec
from xllm_compile.runtime.program import RegionProgram
from xllm_compile.runtime.speculative.config import SpeculativeConfig
from xllm_compile.runtime.warmup import warm_up

INPUTS = (
    TensorSpec(name="delta", shape=("T", 3), dtype="float32"),
    TensorSpec(name="seq_start", shape=("S1",), dtype="int32"),
    TensorSpec(name="kv_cache", shape=("L", "M"), dtype="float32"),
)


def recording_cache(ran, *buckets, regions=("embed", "layer", "layer.window8")):
    """Its graphs note the region, the sizes of their inputs and the last tensor."""

    def graph(region, size):
        def run(tensors):
            delta, seq_start, *rest = tensors
            assert not delta.any() and not seq_start.any()
            ran.append((region, size, len(delta), len(seq_start), rest[-1]))
            return []

        return run

    sizes = {region: (0,) if region == "embed" else (0, *buckets) for region in regions}
    return GraphCache(
        programs={
            name: RegionProgram(name=name, code="", inputs=INPUTS, weights=(), layers=(), is_eager=name == "eager")
            for name in (*regions, "eager")
        },
        times=TIMES,
        graphs={(region, size): graph(region, size) for region in regions for size in sizes[region]},
    )


def test_the_largest_bucket_is_first_and_all_layers_are_last():
    ran: list[Any] = []
    calls: list[tuple[str, list[Any]]] = [
        ("embed", ["e"]),
        ("layer", ["0"]),
        ("layer.window8", ["1"]),
        ("eager", ["x"]),
        ("layer", ["2"]),
    ]
    graphs = recording_cache(ran, 1, 64)
    warm_up(graphs, calls)
    assert ran == [
        ("layer", 64, 64, 65, "0"),
        ("layer.window8", 64, 64, 65, "1"),
        ("layer", 1, 1, 2, "0"),
        ("layer.window8", 1, 1, 2, "1"),
        # A dynamic graph is not run on one row.
        ("embed", 0, 2, 3, "e"),
        ("layer", 0, 2, 3, "0"),
        ("layer.window8", 0, 2, 3, "1"),
        ("layer", 0, 2, 3, "2"),
    ]
    assert not graphs.counts and not graphs.demand


def test_a_graph_that_fails_is_given_up(caplog):
    def broken(tensors):
        raise RuntimeError("out of luck")

    ran: list[Any] = []
    graphs = recording_cache(ran, 4)
    graphs.graphs["layer", 4] = broken
    calls: list[tuple[str, list[Any]]] = [("embed", ["e"]), ("layer", ["0"]), ("layer.window8", ["1"])]
    warm_up(graphs, calls)
    assert "the graph of region layer for bucket 4 is given up: out of luck" in caplog.text
    assert graphs.buckets == () and graphs.choose(4).outcome == "dynamic"
    assert [entry[:2] for entry in ran] == [("layer.window8", 4), ("embed", 0), ("layer", 0), ("layer.window8", 0)]


@pytest.mark.parametrize("is_eager", [False, True])
def test_nothing_of_it_stays(family_artifact, kernels, is_eager):
    """Live sequences keep their KV, and steps compute what they compute without."""
    results = []
    for is_warm in (False, True):
        runner, manifest, layers = compiled_runner(family_artifact("qwen3"), enforce_eager=is_eager)
        for index, layer in enumerate(layers):
            layer.normal_(generator=torch.Generator().manual_seed(index))
        before = [layer.clone() for layer in layers]
        if is_warm:
            runner.warm_up()
        assert all(torch.equal(layer, old) for layer, old in zip(layers, before, strict=True))
        assert not runner.graph_cache_stats().choices
        results.append(runner.execute(step_of((3, 1, 5), manifest.model.vocab_size, seed=1)).clone())
    assert torch.equal(*results)


def test_the_pool_has_been_as_large_as_the_largest_step_makes_it(family_artifact, kernels):
    runner, manifest, _ = compiled_runner(family_artifact("qwen3"))
    (bucket,) = manifest.token_buckets
    pool: Any = runner.pool
    pool.reset_peak()
    runner.warm_up()
    warmed = pool.stats().peak
    pool.reset_peak()
    runner.execute(step_of((bucket,), manifest.model.vocab_size, seed=1))
    # State that one layer hands to the next leaves holes, a third of a layer's own at most.
    assert 0 < pool.stats().peak <= warmed * 4 / 3 and pool.stats().in_use == 0


def test_a_draft_model_is_warmed_too(family_artifact, kernels):
    """A model that drafts for itself, with and without."""
    root = family_artifact("qwen3")
    speculative = SpeculativeConfig(method="draft", draft_model=root)
    prompts, tokens = random_prompts((3, 40), 4099), []
    cases: list[dict[str, Any]] = [{}, {"speculative": speculative}, {"speculative": speculative, "warm_up": True}]
    for options in cases:
        instance = open_instance(root, InstanceConfig(max_num_seqs=4, **options))
        tokens.append(greedy(instance.engine, prompts, 12))
        instance.engine.close()
    assert tokens[0] == tokens[1] == tokens[2]
