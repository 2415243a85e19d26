"""When the host hears of a step."""

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.runtime.fakes import make_kv_cache
from xllm_compile.runtime.batch import Batch
from xllm_compile.runtime.kv_cache import KVCache
from xllm_compile.runtime.outputs import GraphCacheStats
from xllm_compile.runtime.step import Step
from xllm_compile.runtime.step_executor import StepExecutor, StepResult


class PausingRunner:
    """Stands before and behind its layers until it is let through."""

    vocab_size = max_model_len = max_num_seqs = max_num_batched_tokens = embedding_size = 8

    def __init__(self) -> None:
        self.at_start = threading.Semaphore(0)
        self.starts = threading.Semaphore(0)
        self.ends = threading.Semaphore(0)
        self.fails = False

    def execute(self, step: Step, on_layers: Callable[[], None] | None = None) -> Tensor:
        self.at_start.release()
        assert self.starts.acquire(timeout=30)
        if self.fails:
            raise RuntimeError("before the layers")
        if on_layers is not None:
            on_layers()
        assert self.ends.acquire(timeout=30)
        return torch.empty(0, 8)

    def pooled(self) -> Tensor:
        return torch.empty(0, 8)

    def last_outcome(self) -> str:
        return "exact"

    def graph_cache_stats(self) -> GraphCacheStats:
        return GraphCacheStats(choices={})


class Waiter:
    """A host's thread that waits for one step."""

    def __init__(self, wait: Callable[[], object]) -> None:
        self.heard = threading.Event()
        self.error: Exception | None = None
        self._wait = wait
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._wait()
        except Exception as err:
            self.error = err
        self.heard.set()

    def join(self) -> None:
        assert self.heard.wait(30)
        self._thread.join()


def _batch() -> Batch:
    nothing = np.empty(0, dtype=np.int32)
    step = Step(
        token_ids=nothing,
        positions=nothing,
        rope_len=nothing,
        seq_start=np.zeros(1, dtype=np.int32),
        context_len=nothing,
        slot=nothing,
        logits_at=nothing,
    )
    return Batch(
        step=step,
        sampled=[],
        sampled_slots=nothing,
        prompt_rows=[],
        pool_rows=[],
        pending_rows=nothing,
        pending_slots=nothing,
        drafting=[],
        num_granted=[],
        num_wanted=[],
        restores=(),
    )


@pytest.fixture
def cache() -> KVCache:
    return make_kv_cache()


def _two_steps(runner: PausingRunner, cache: KVCache) -> tuple[StepExecutor, Waiter, Waiter]:
    """Both launched: the first is over, the second stands before its layers."""
    executor = StepExecutor(runner, cache.xtensor, cache.num_slots, is_async=True)
    first = Waiter(executor.launch(_batch()))
    second = Waiter(executor.launch(_batch()))
    runner.starts.release()
    runner.ends.release()
    for _ in range(2):
        assert runner.at_start.acquire(timeout=30)
    return executor, first, second


def test_a_step_is_told_when_the_next_one_reaches_its_layers(cache: KVCache) -> None:
    runner = PausingRunner()
    executor, first, second = _two_steps(runner, cache)
    # The first one is over: the second stands before its layers, with Python's lock for itself.
    assert not first.heard.is_set()
    runner.starts.release()
    first.join()
    assert not second.heard.is_set()
    runner.ends.release()
    # With nothing launched behind it, it is told at once.
    second.join()
    executor.close()
    assert first.error is second.error is None


def test_what_a_wait_finds_is_not_lost(cache: KVCache) -> None:
    runner = PausingRunner()
    executor = StepExecutor(runner, cache.xtensor, cache.num_slots, is_async=True)
    take = executor.launch(_batch())
    executor.wait(0.0)
    executor.interrupt()
    executor.wait(60)
    assert not executor.has_ended
    runner.starts.release()
    runner.ends.release()
    executor.wait(60)
    assert executor.has_ended
    assert isinstance(take(), StepResult)
    assert not executor.has_ended
    executor.close()


def test_a_step_is_told_although_the_next_one_fails_before_its_layers(cache: KVCache) -> None:
    runner = PausingRunner()
    executor, first, second = _two_steps(runner, cache)
    runner.fails = True
    runner.starts.release()
    first.join()
    second.join()
    executor.close()
    assert first.error is None
    assert isinstance(second.error, RuntimeError)
