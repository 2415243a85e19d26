"""How many tokens of prompts ride along, so that the sequences that decode in the same step keep their TPOT."""

import math
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from xllm_compile.runtime.policies.state import Schedulable

# A sequence that fell behind asks for shorter steps, but not for less than this share of its target: prefill would
# stop altogether, and with it the TTFT of everybody else. Source: xLLM's latency budget.
_LEAST_SHARE = 0.65
# Nor for less than leaves prompts this share of the time between the decodes alone and the target. A sequence whose KV
# came from another instance begins some steps behind; where such come all the time and decodes take most of the target
# by themselves, there is little to make up for it with, and no prompt would ever get more than its least chunk.
_PROMPTS_SHARE = 0.5


class StepLoad(NamedTuple):
    """What of a step decides its time."""

    num_tokens: int = 0
    num_seqs: int = 0
    num_keys: int = 0
    """Keys that attention reads: the sum of the sequences' contexts."""
    num_pairs: int = 0
    """(query, key) pairs that attention computes beyond one query per sequence: what makes prefill quadratic."""

    def plus(self, num_computed: int, count: int) -> "StepLoad":
        """With ``count`` tokens more, of a sequence that has ``num_computed`` in the KV cache."""
        context = num_computed + count
        return StepLoad(
            self.num_tokens + count,
            self.num_seqs + 1,
            self.num_keys + context,
            self.num_pairs + (count - 1) * num_computed + count * (count - 1) // 2,
        )


def load_of(chunks: Iterable[tuple[Schedulable, int]]) -> StepLoad:
    """Of a planned step, before its tokens count as computed."""
    num_tokens = num_seqs = num_keys = num_pairs = 0
    for sequence, count in chunks:
        computed = sequence.num_computed_tokens
        num_tokens += count
        num_seqs += 1
        num_keys += computed + count
        if count > 1:
            num_pairs += (count - 1) * computed + count * (count - 1) // 2
    return StepLoad(num_tokens, num_seqs, num_keys, num_pairs)


class StepSeconds(Protocol):
    """Predicted time of steps."""

    def seconds(self, load: StepLoad) -> float: ...


class Paced(Protocol):
    """What of a decoding sequence says how long its steps may take (policies/state.py: Schedulable)."""

    @property
    def tpot_slo_s(self) -> float | None: ...

    @property
    def next_due_s(self) -> float: ...


class StepBudget(NamedTuple):
    """How long a step may be for those that decode in it; infinity without targets."""

    seconds: float = math.inf
    """Keeps the tightest TPOT target, and makes up for delay."""
    target_s: float = math.inf
    """The tightest itself."""

    def with_prompts_s(self, alone_s: float) -> float:
        """With online prompts beside them, where the step takes so long without."""
        if self.target_s == math.inf:
            return math.inf
        return max(self.seconds, self.target_s - (1 - _PROMPTS_SHARE) * max(0.0, self.target_s - alone_s))


def step_budget(decodes: Iterable[Paced], now: float, awaited_s: float = math.inf) -> StepBudget:
    """awaited_s: the tightest TPOT target of sequences that may come to decode here at any moment.

    They would wait for the end of a step that was planned as if nobody decoded: with an answer of few tokens that is
    more than its TPOT target leaves.
    """
    seconds = tightest_s = awaited_s
    for sequence in decodes:
        target_s = sequence.tpot_slo_s
        if target_s is not None:
            slack_s = sequence.next_due_s - now
            seconds = min(seconds, target_s, max(slack_s, _LEAST_SHARE * target_s))
            tightest_s = min(tightest_s, target_s)
    return StepBudget(seconds, tightest_s)


def largest_chunk(load: StepLoad, num_computed: int, most: int, budget_s: float, model: StepSeconds) -> int:
    """Most tokens of a sequence, up to ``most``, that the step can take within its budget; 0 where none."""
    if model.seconds(load.plus(num_computed, most)) <= budget_s:
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        if model.seconds(load.plus(num_computed, middle)) <= budget_s:
            low = middle
        else:
            high = middle
    return low
