"""How many tokens of prompts ride along, so that the sequences that decode in the same step keep their TPOT."""

import math
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from xllm_compile.runtime.policies.state import Schedulable

# A sequence that fell behind asks for shorter steps, but not for less than this share of its target, as long as the
# steps that it has left can make up for it: prefill would stop altogether, and with it the TTFT of everybody else.
# Source: xLLM's latency budget.
_LEAST_SHARE = 0.65
# Nor for less than leaves prompts this share of the time between the decodes alone and the target. A sequence whose KV
# came from another instance begins some steps behind; where such come all the time and decodes take most of the target
# by themselves, there is little to make up for it with, and no prompt would ever get more than its least chunk.
_PROMPTS_SHARE = 0.5
# A sequence whose KV comes from another instance is on its way for a while, waits for the step under way, and has its
# token from the next one. Where its answer has few tokens those three are its TPOT, and each may take a third of it.
_PARTS_OF_JOIN = 3
# Likewise one that is behind with few steps left, if so many steps of a third put it in time: prompts are not to wait
# for long for what is late in any case.
_MOST_SHORT_STEPS = 3
TARGET_SHARE = 0.9
"""Of a target that a step with prompts is planned to take: planned to take all of it, half of them end a little later.
The rest, few prompt tokens, is for what predictions are off by, and for the way to the client."""


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
    def num_growth_tokens(self) -> int: ...

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
    last_s: float = math.inf
    """What a sequence can take that has too few steps left to make up for more."""

    def with_prompts_s(self, alone_s: float) -> float:
        """With online prompts beside them, where the step takes so long without."""
        target_s = TARGET_SHARE * self.target_s
        shared_s = target_s
        if alone_s < target_s < math.inf:
            shared_s = alone_s + _PROMPTS_SHARE * (target_s - alone_s)
        return min(max(min(self.seconds, target_s), shared_s), TARGET_SHARE * self.last_s)


def awaited_step_s(target_s: float, num_output_tokens: float) -> float:
    """Longest step while a sequence may come to decode at any moment: one that has its first token, of about so many,
    elsewhere."""
    return min(target_s, (target_s + _made_up_s(target_s, num_output_tokens - 2)) / _PARTS_OF_JOIN)


def _made_up_s(target_s: float, num_steps: float) -> float:
    """By so many steps, each as short as it is kept for a sequence that is behind."""
    return (1 - _LEAST_SHARE) * target_s * max(0.0, num_steps)


def step_budget(decodes: Iterable[Paced], now: float, awaited_s: float = math.inf) -> StepBudget:
    """awaited_s: what `awaited_step_s` says of those that are awaited."""
    seconds = tightest_s = last_s = math.inf
    for sequence in decodes:
        target_s = sequence.tpot_slo_s
        if target_s is not None:
            slack_s = sequence.next_due_s - now
            seconds = min(seconds, target_s, max(slack_s, _LEAST_SHARE * target_s))
            tightest_s = min(tightest_s, target_s)
            last_s = min(last_s, _last_s(target_s, slack_s, sequence.num_growth_tokens))
    return StepBudget(min(seconds, awaited_s), tightest_s, min(last_s, awaited_s))


def _last_s(target_s: float, slack_s: float, num_later: int) -> float:
    """What the next step can take of a sequence that has so many later ones; infinity where no step is short enough."""
    least_s = target_s / _PARTS_OF_JOIN
    if slack_s + (target_s - least_s) * min(num_later, _MOST_SHORT_STEPS - 1) < least_s:
        return math.inf
    return max(slack_s + _made_up_s(target_s, num_later), least_s)


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
