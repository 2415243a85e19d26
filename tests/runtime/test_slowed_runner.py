"""A slowed-down device: the same answers, at the time that was asked for."""

from typing import cast

import pytest
import torch

from xllm_compile.benchmarks.step_timing import step_of
from xllm_compile.runtime.instance_config import InstanceConfig
from xllm_compile.runtime.policies.chunk import StepLoad
from xllm_compile.runtime.slowed_runner import SlowedRunner, load_of_step
from xllm_compile.runtime.step import ModelRunner, Step

# A decode, a prompt, and a chunk behind 10 tokens.
SEQUENCES = ((1, 8), (5, 5), (4, 14))


def test_the_load_of_a_step_is_what_the_scheduler_planned():
    load = StepLoad()
    for count, context in SEQUENCES:
        load = load.plus(context - count, count)
    assert load_of_step(step_of(SEQUENCES, vocab_size=16, seed=0)) == load


def test_a_step_is_computed_at_once_and_kept_back(monkeypatch):
    now = [100.0]
    asked: list[Step] = []
    slept: list[float] = []

    class Runner:
        vocab_size, max_model_len, max_num_seqs, max_num_batched_tokens, embedding_size = 16, 64, 4, 32, 8

        def execute(self, step, on_layers=None):
            asked.append(step)
            now[0] += 0.25
            return torch.ones(1)

    def seconds(load):
        return 0.1 * load.num_tokens

    monkeypatch.setattr("xllm_compile.runtime.slowed_runner.time.monotonic", lambda: now[0])
    monkeypatch.setattr("xllm_compile.runtime.slowed_runner.time.sleep", slept.append)
    runner = SlowedRunner(cast(ModelRunner, Runner()), seconds)
    assert (runner.vocab_size, runner.max_num_batched_tokens) == (16, 32)
    step = step_of(SEQUENCES, vocab_size=16, seed=0)
    assert runner.execute(step).tolist() == [1.0]
    assert asked == [step]
    # One that took longer is not made up for.
    runner.execute(step_of(((1, 8),), vocab_size=16, seed=0))
    assert slept == pytest.approx([1.0 - 0.25, 0.0])


def test_nothing_is_faster_than_the_machine():
    with pytest.raises(ValueError, match=r"slow_down=0\.5 must be at least 1"):
        InstanceConfig(slow_down=0.5)
