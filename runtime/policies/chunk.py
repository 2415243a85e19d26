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
# A sequence whose KV comes from another instance waits for the step under way and for the one planned beside it, and
# has its token from a third. Where answers have few tokens those three are its TPOT, so while it is awaited each is to
# take a third of its target, or prompts this share of what decodes leave, where that is more.
_STEPS_TO_JOIN = 3
_PROMPTS_SHARE_AWAITED = 0.25


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
    awaited_s: float = math.inf
    """The tightest of sequences that may come to decode here at any moment."""

    def with_prompts_s(self, alone_s: float) -> float:
        """With online prompts beside them, where the step takes so long without."""
        return min(
            max(self.seconds, _shared_s(self.target_s, alone_s, _PROMPTS_SHARE)),
            max(self.awaited_s / _STEPS_TO_JOIN, _shared_s(self.awaited_s, alone_s, _PROMPTS_SHARE_AWAITED)),
        )


def _shared_s(target_s: float, alone_s: float, share: float) -> float:
    """A step where prompts have this share of what decodes alone leave of the target."""
    return target_s if alone_s >= target_s else alone_s + share * (target_s - alone_s)


def step_budget(decodes: Iterable[Paced], now: float, awaited_s: float = math.inf) -> StepBudget:
    """awaited_s: as StepBudget has it."""
    seconds = tightest_s = math.inf
    for sequence in decodes:
        target_s = sequence.tpot_slo_s
        if target_s is not None:
            slack_s = sequence.next_due_s - now
            seconds = min(seconds, target_s, max(slack_s, _LEAST_SHARE * target_s))
            tightest_s = min(tightest_s, target_s)
    return StepBudget(min(seconds, awaited_s), tightest_s, awaited_s)


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
