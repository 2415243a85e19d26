"""What the controller makes of texts whose drafts fare well and badly, played on a fake clock."""

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from xllm_compile.runtime.sampler import SampledToken
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.runtime.speculative.adaptive import StepSeconds
from xllm_compile.runtime.speculative.proposer import Draft, Speculation
from xllm_compile.runtime.speculative.speculator import Speculator
from xllm_compile.runtime.speculative.verify import Verified
from xllm_compile.runtime.step import Step

MAX_LENGTH = 8
COLD = 5.0


class Player:
    """One sequence after the other. A step of n rows takes 1 + 0.04 (n - 1), a draft of k tokens 0.12 (1 + k); each
    size takes 5 times as long when it runs first."""

    def __init__(self) -> None:
        self.now = 0.0
        self.num_drafted = 0
        self.is_costly = True
        self.speculator = Speculator(
            self, max_length=MAX_LENGTH, step_seconds=StepSeconds(lambda rows: 1.0), clock=lambda: self.now
        )
        self._rng = random.Random(8)
        self._warm: set[tuple[str, int]] = set()

    def observe(self, sequence: Speculation) -> int | None:
        return 0

    def propose(self, sequences: Sequence[Speculation], lengths: Sequence[int]) -> list[Draft]:
        self._take("draft", max(lengths), 0.12 * (1 + max(lengths)))
        self.num_drafted += sum(lengths)
        return [Draft([7] * length) for length in lengths]

    def forget(self, sequence: Speculation) -> None:
        pass

    def play(self, chance: float, num_tokens: int, **params: Any) -> float:
        """Generate a text whose drafted tokens are accepted with this chance. Returns its time."""
        started = self.now
        speculation = self.speculator.start(
            SamplingParams(**params), [1, 2], num_prompt_tokens=2, max_output_tokens=num_tokens
        )
        sequence = SimpleNamespace(speculation=speculation, sampling=SimpleNamespace(matcher=None))
        assert speculation is not None
        granted = 0
        while speculation.num_left_tokens > 0:
            # The next step is planned while this one runs.
            planned = self.speculator.reserve(speculation)
            batch = _batch(sequence, speculation, min(granted, speculation.num_left_tokens - 1))
            step, drafts = self.speculator.draft(batch)
            num_accepted = 0
            while num_accepted < len(drafts[0].token_ids) and self._rng.random() < chance:
                num_accepted += 1
            began, num_rows = self.now, len(step.token_ids)
            self._take("step", num_rows, 1 + 0.04 * (num_rows - 1))
            verified: Verified = [SampledToken(token_id=7)] * (num_accepted + 1)
            self.speculator.learn(batch, drafts, [verified], self.now - began)
            granted = planned
        return self.now - started

    def _take(self, what: str, size: int, seconds: float) -> None:
        is_warm = (what, size) in self._warm
        self._warm.add((what, size))
        self.now += seconds if is_warm else COLD * seconds


def _batch(sequence: Any, speculation: Speculation, granted: int) -> Any:
    end = len(speculation.token_ids)
    zero = np.zeros(1, dtype=np.int32)
    step = Step(
        token_ids=zero,
        positions=zero + end - 1,
        rope_len=zero + end,
        seq_start=np.arange(2, dtype=np.int32),
        context_len=zero + end,
        slot=zero,
        logits_at=zero,
    )
    drafting = [speculation] if granted else []
    return SimpleNamespace(
        step=step,
        sampled=[sequence],
        drafting=drafting,
        num_granted=[granted] * len(drafting),
        num_wanted=[granted] * len(drafting),
        is_decode_only=True,
    )


GREEDY: dict[str, Any] = {"temperature": 0}
HOT: dict[str, Any] = {"temperature": 2.0, "seed": 1}


def test_text_that_pays_is_drafted_from_its_start() -> None:
    player = Player()
    player.play(0.0, 16, **HOT)
    # Lengths of 8 bring 7 tokens in 2.4 steps; a greedy text is not judged by the other.
    speedups = [256 / player.play(0.95, 256, **GREEDY) for _ in range(4)]
    assert min(speedups[1:]) > 2.0, speedups


def test_text_that_does_not_pay_costs_next_to_nothing() -> None:
    player = Player()
    player.play(0.0, 16, **HOT)
    drafted = player.num_drafted
    slowdowns = [player.play(0.05, 256, **HOT) / 256 for _ in range(8)]
    assert sum(slowdowns) < 8 * 1.01, slowdowns
    assert player.num_drafted - drafted < 30


def test_hot_text_is_shown_to_a_draft_model_late() -> None:
    player = Player()
    player.play(0.0, 960, **HOT)
    assert player.num_drafted == 0
    player.play(0.0, 192, **HOT)
    assert player.num_drafted > 0


def test_a_text_that_begins_to_pay_is_noticed() -> None:
    player = Player()
    for _ in range(4):
        player.play(0.05, 256, **GREEDY)
    # A probe comes within 1024 steps, and one that is accepted soon brings others.
    player.play(0.95, 1024 + 128, **GREEDY)
    assert 256 / player.play(0.95, 256, **GREEDY) > 2.0


def test_a_size_that_was_slow_once_is_tried_again() -> None:
    player = Player()
    player.speculator._step_seconds.observe(9, 1.0)
    for rows in range(2, 9):
        for _ in range(3):
            player.speculator._step_seconds.observe(rows, 9.0)
    player.play(0.95, 2048, **GREEDY)
    assert 256 / player.play(0.95, 256, **GREEDY) > 2.0


@pytest.mark.parametrize("chance", [0.3, 0.5, 0.7])
def test_in_between_it_is_never_much_slower_than_without(chance: float) -> None:
    player = Player()
    player.play(0.0, 16, **HOT)
    player.play(chance, 256, **GREEDY)
    assert player.play(chance, 1024, **GREEDY) / 1024 < 1.02
