"""Which graph runs a step, and that each of them computes what the eager program does."""

import numpy as np
import pytest
import torch

from xllm_compile.graph_passes.step_cost import DYNAMIC_OVERHEAD, step_cost
from xllm_compile.runtime.artifact import read_manifest
from xllm_compile.runtime.graph_cache import BucketChoice, GraphCache
from xllm_compile.runtime.model_runner import CompiledModelRunner
from xllm_compile.runtime.step import Step
from xllm_compile.runtime.weights import map_weights


def cache(*buckets, regions=("layer",)):
    """Graphs are told apart by what they return."""
    graphs = {("embed", 0): graph("embed", 0)}
    graphs |= {(region, size): graph(region, size) for region in regions for size in (0, *buckets)}
    return GraphCache(buckets=buckets, graphs=graphs, eager={})


def graph(region, size):
    return lambda tensors: [(region, size)]


@pytest.mark.parametrize(
    ("size", "outcome", "padded_to"),
    [
        # Padding is cheaper than the dynamic graph up to a tenth of the cost.
        (1, "exact", 1),
        (2, "padded", 4),
        (3, "padded", 4),
        (4, "exact", 4),
        (5, "dynamic", 5),
        (56, "dynamic", 56),
        (57, "padded", 64),
        (63, "padded", 64),
        (64, "exact", 64),
        (65, "dynamic", 65),
    ],
)
def test_choices(size, outcome, padded_to):
    graphs = cache(1, 4, 64)
    assert graphs.choose(size) == BucketChoice(outcome=outcome, size=padded_to)
    assert graphs.counts == {"exact": 0, "padded": 0, "dynamic": 0, "eager": 0} | {outcome: 1}


def test_padding_is_chosen_where_it_costs_less():
    graphs = cache(1, 4, 16, 64, 512)
    for size in range(1, 513):
        choice = graphs.choose(size)
        bucket = min(b for b in graphs.buckets if b >= size)
        dynamic = step_cost(size) * DYNAMIC_OVERHEAD
        assert (choice.outcome == "dynamic") == (bucket != size and step_cost(bucket) > dynamic)
        assert choice.size == (size if choice.outcome == "dynamic" else bucket)
    assert sum(graphs.counts.values()) == 512 and graphs.counts["exact"] == 5


def test_the_graph_of_a_choice():
    graphs = cache(1, 4)
    assert graphs.graph("layer", graphs.choose(4))([]) == [("layer", 4)]
    assert graphs.graph("layer", graphs.choose(3))([]) == [("layer", 4)]
    assert graphs.graph("layer", graphs.choose(9))([]) == [("layer", 0)]
    # A region without fixed shapes runs its dynamic graph on the padded step.
    assert graphs.graph("embed", graphs.choose(4))([]) == [("embed", 0)]


def test_without_graphs_everything_is_eager():
    graphs = GraphCache(buckets=(4,), graphs={}, eager={"layer": graph("layer", "eager")})
    assert graphs.choose(4) == BucketChoice(outcome="eager", size=4)
    assert graphs.graph("layer", graphs.choose(4))([]) == [("layer", "eager")]
    assert graphs.counts["eager"] == 2


def step_of(lengths, vocab_size, seed):
    """A step whose sequences start new: lengths of their prompts."""
    rng = np.random.default_rng(seed)

    def ints(values):
        return np.array(list(values), dtype=np.int32)

    total = sum(lengths)
    return Step(
        token_ids=rng.integers(vocab_size, size=total).astype(np.int32),
        positions=ints(i for length in lengths for i in range(length)),
        rope_len=ints(length for length in lengths for _ in range(length)),
        seq_start=ints(np.cumsum([0, *lengths])),
        context_len=ints(lengths),
        slot=ints(range(len(lengths))),
        logits_at=ints(np.cumsum(lengths) - 1),
    )


@pytest.mark.numerics
@pytest.mark.parametrize(
    "lengths", [(1,), (2,), (3,), (1, 2), (4,), (2, 1, 1), (1, 1, 1, 1), (5,), (3, 2), (64,), (65,)]
)
def test_compiled_graphs_equal_eager_programs(lengths, family_artifact, kernels):
    """Sizes around the bucket of 4, in tokens, sequences and rows of logits. The kernels are the same and what is
    between them is element-wise, but cos and sin may differ in the last bit."""
    root = family_artifact("qwen2")
    manifest = read_manifest(root)
    weights = map_weights(root / manifest.weights.path)
    results, caches = [], []
    for is_eager in (True, False):
        model = manifest.model
        layers = [torch.zeros(8, 80, 2, model.num_kv_heads, model.head_dim) for _ in range(model.num_layers)]
        runner = CompiledModelRunner(
            root,
            manifest,
            weights,
            layers,
            max_model_len=80,
            max_num_seqs=8,
            max_num_batched_tokens=80,
            enforce_eager=is_eager,
        )
        results.append(runner.execute(step_of(lengths, model.vocab_size, seed=len(lengths))).clone())
        caches.append(layers)
        stats = runner.graph_cache_stats()
        expected = {2: "padded", 3: "padded", 4: "exact"}.get(sum(lengths), "dynamic")
        assert stats["eager" if is_eager else expected] == 1
    assert results[1].shape == (len(lengths), manifest.model.vocab_size)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-4)
    for compiled, eager in zip(caches[1], caches[0], strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-4)
