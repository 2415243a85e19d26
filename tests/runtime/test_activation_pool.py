"""The pool that all graphs share: as large as the largest needs, counted in bytes on the real runner."""

import gc

import pytest
import torch

from tests.runtime.graphs import compiled_runner, step_of
from xllm_compile.graph_passes.memory_plan import ALIGNMENT
from xllm_compile.runtime.ops.native import ActivationPool

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture
def pool():
    gc.collect()
    pool = ActivationPool(1 << 20)
    assert pool.stats().in_use == 0
    return pool


def test_what_is_allocated_inside_comes_from_the_pool_until_it_is_freed(pool):
    pool.reset_peak()
    with pool:
        inside = torch.ones(100)
    outside = torch.ones(100)
    assert pool.stats().in_use == pool.stats().peak == 448 and 448 % ALIGNMENT == 0
    kept = inside[:1]
    del inside
    # A view holds the block, whoever made it.
    assert pool.stats().in_use == 448
    del kept
    assert pool.stats().in_use == 0
    assert outside.sum() == 100


def test_blocks_are_reused_and_hold_their_values(pool):
    with pool:
        first, second = torch.full((1000,), 1.0), torch.full((1000,), 2.0)
        address = first.data_ptr()
        del first
        third = torch.full((1000,), 3.0)
    assert third.data_ptr() == address
    assert (second == 2).all() and (third == 3).all()


def test_what_does_not_fit_comes_from_elsewhere_and_is_counted(pool):
    before, capacity = pool.stats().num_overflows, pool.stats().capacity
    with pool:
        large = torch.ones(capacity // 4 + 1)
    assert large.sum() == capacity // 4 + 1
    assert pool.stats().num_overflows == before + 1 and pool.stats().in_use == 0


def test_torch_s_own_kernels_run_with_it(pool):
    """Some allocate scratch memory without a tensor around it, inside and outside of a step."""
    x, weight = torch.randn(5, 64, dtype=torch.bfloat16), torch.randn(32, 64, dtype=torch.bfloat16)
    outside = torch.nn.functional.linear(x, weight)
    with pool:
        inside = torch.nn.functional.linear(x, weight)
    assert torch.equal(inside, outside)
    del inside
    assert pool.stats().in_use == 0


def test_an_error_inside_leaves_the_pool(pool):
    with pytest.raises(ZeroDivisionError), pool:
        raise ZeroDivisionError
    after = torch.ones(10)
    assert pool.stats().in_use == 0 and after.sum() == 10


@pytest.fixture
def runner(family_artifact):
    runner, manifest, _ = compiled_runner(family_artifact("qwen3"), max_model_len=300)
    return manifest, runner


def peak_of(runner, manifest, lengths):
    gc.collect()
    runner.pool.reset_peak()
    assert runner.pool.stats().in_use == 0
    runner.execute(step_of(lengths, manifest.model.vocab_size, seed=1))
    return runner.pool.stats().peak


def test_the_peak_is_the_largest_graph_s_and_not_the_sum(runner):
    manifest, runner = runner
    overflows = runner.pool.stats().num_overflows
    planned = manifest.memory_plan["activation_bytes"]
    largest = peak_of(runner, manifest, (256,))
    # The plan is made for four rows of logits, the head's largest bucket; here it is one. And it counts what is handed
    # on, two tensors of a row for each token, to the end of the region that reads it, as when regions run one by one.
    # In one call a graph frees each after its last reader, and what comes next lies closer.
    rows, handed_on = 4 * (4 * manifest.model.vocab_size), 4 * (256 * manifest.model.hidden_size)
    assert planned - rows - 3 * handed_on <= largest <= planned
    small = [peak_of(runner, manifest, lengths) for lengths in ((1,), (4,), (2, 1, 1))]
    assert max(small) < largest / 2
    # Everything again, without the resets: nothing comes on top.
    runner.pool.reset_peak()
    for lengths in ((4,), (256,), (1,), (200, 56), (4,)):
        runner.execute(step_of(lengths, manifest.model.vocab_size, seed=1))
    by_graph = [
        plan["peak_bytes"] for plan in manifest.graph_plans if plan["sizes"]["T"] in (256, *manifest.token_buckets)
    ]
    assert runner.pool.stats().peak <= planned < sum(by_graph)
    assert runner.pool.stats().num_overflows == overflows
