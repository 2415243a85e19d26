"""Steps as one native call, and greedy decode steps in a row: what the same graphs give one by one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.runtime.graphs import compiled_runner, step_of
from xllm_compile.runtime.decode_loop import decode_by_steps
from xllm_compile.runtime.model_runner import CompiledModelRunner
from xllm_compile.runtime.ops.native import KernelError
from xllm_compile.runtime.step import Step

NUM_STEPS = 6


@pytest.fixture(scope="module")
def artifact(kernels: Path, family_artifact: Callable[[str], Path]) -> Path:
    return family_artifact("qwen3")


def decode_step(runner: CompiledModelRunner, lengths: list[int]) -> Step:
    """The first token after prompts of these lengths."""
    prompts = step_of(lengths, runner.vocab_size, 3)
    best = runner.execute(prompts).numpy().argmax(axis=1)
    count = len(lengths)
    return replace(
        prompts,
        token_ids=best.astype(np.int32),
        positions=prompts.context_len,
        rope_len=prompts.context_len + 1,
        seq_start=np.arange(count + 1, dtype=np.int32),
        context_len=prompts.context_len + 1,
        logits_at=np.arange(count, dtype=np.int32),
    )


@pytest.mark.parametrize("lengths", [[5], [3, 9, 1], [2] * 8])
def test_a_loop_is_the_same_steps_one_by_one(artifact: Path, lengths: list[int]) -> None:
    looping, _, kv_of_loop = compiled_runner(artifact)
    stepping, _, kv_of_steps = compiled_runner(artifact)
    step = decode_step(looping, lengths)
    given = [array.copy() for array in (step.token_ids, step.positions, step.rope_len, step.context_len)]
    expected = decode_by_steps(stepping.execute, decode_step(stepping, lengths), NUM_STEPS)
    chosen = looping.decode_greedily(step, NUM_STEPS)
    assert looping._whole_steps._steps, "no native loop was made"
    assert chosen.shape == (NUM_STEPS, len(lengths)) and (chosen == expected).all()
    for ours, theirs in zip(kv_of_loop, kv_of_steps, strict=True):
        assert torch.equal(ours, theirs)
    # The step is the caller's.
    for before, after in zip(given, (step.token_ids, step.positions, step.rope_len, step.context_len), strict=True):
        assert (before == after).all()


@pytest.mark.parametrize("lengths", [[1], [4], [5, 1], [3, 9, 1]])
def test_a_whole_step_is_its_graphs_one_by_one(
    artifact: Path, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _, kv_of_whole = compiled_runner(artifact)
    apart, _, kv_of_parts = compiled_runner(artifact)
    monkeypatch.setattr(apart._whole_steps, "of", lambda *_: None)
    step = step_of(lengths, whole.vocab_size, 5)
    told: list[str] = []
    logits = whole.execute(step, lambda: told.append("layers"))
    assert whole._whole_steps._steps, "the step was not one native call"
    assert told == ["layers"]
    assert torch.equal(logits, apart.execute(step))
    for ours, theirs in zip(kv_of_whole, kv_of_parts, strict=True):
        assert torch.equal(ours, theirs)
    assert whole.graph_cache_stats() == apart.graph_cache_stats()


def test_a_graph_that_is_gone_leaves_the_tokens_as_they_are(artifact: Path) -> None:
    runner, _, _ = compiled_runner(artifact)
    step = decode_step(runner, [4, 6])
    expected = runner.decode_greedily(step, NUM_STEPS)
    for key in [key for key in runner._token_graphs.graphs if key[0] != "embed"]:
        runner._token_graphs.give_up(*key, RuntimeError("lost"))
    assert (runner.decode_greedily(step, NUM_STEPS) == expected).all()


def test_a_kernel_that_refuses_its_arguments_ends_the_loop_with_an_error(artifact: Path) -> None:
    runner, _, kv_layers = compiled_runner(artifact)
    step = decode_step(runner, [4])
    with pytest.raises(KernelError, match=r"slot\[0\] is 8, kv_cache has 8 slots"):
        runner.decode_greedily(replace(step, slot=np.array([len(kv_layers[0])], dtype=np.int32)), NUM_STEPS)
