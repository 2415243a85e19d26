"""Who goes first. Online before offline whatever the policy; then

    fcfs      by arrival
    priority  by the request's priority, then by arrival
    deadline  by priority, then by when the first token is due; what cannot be in time any more waits behind what can,
              and so do requests without a target

An instance with a TTFT target for requests that name none goes by deadline unless told otherwise: a queue in order of
arrival that is late stays so, and has every request late.

In each of them a request that began elsewhere goes before those that did not begin: its client is in the middle of an
answer, or has waited in the queue of an instance that was lost, and would wait for as long as a new one does.

A **tier** (offline, or priority) decides who may take whose place: a waiting sequence that of a running one of a
strictly worse tier, and nobody else's. Arrival must not count there, or two sequences would preempt each other in
turns. Within a tier the one that came last loses its place first.

The **elder** is the sequence that came first of all, once it is older than STARVATION_S. It goes before everything
and is never preempted. So every sequence ends: when those before it have ended it is the elder. Only one at a time has
this right, so a long queue of old offline requests takes one place from the online ones and no more. A late elder has
it in every eighth step only: where prompts are all there is to do, there is always a next one after a minute of
overload, and nobody would be in time.

Sources: the deadline order with late requests last follows ProServe, arXiv:2512.12928 (urgency), reduced to what needs
no weights; equal priorities never preempting each other is vllm-project/vllm#40004 and #41951.
"""

import heapq
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby
from operator import attrgetter
from typing import Any, Literal, Self, get_args

from xllm_compile.runtime.policies.state import Q, Queued

PolicyName = Literal["fcfs", "priority", "deadline"]
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)
PolicyChoice = Literal["auto", PolicyName]
"""auto is deadline where there is a TTFT target for those that name none, else fcfs: who names one would go before all
others."""
POLICY_CHOICES: tuple[PolicyChoice, ...] = get_args(PolicyChoice)

Key = tuple[Any, ...]

STARVATION_S = 60.0
"""Age of an elder, at least."""
_STEPS_PER_LATE_ELDER = 8

_number = attrgetter("number")


@dataclass(frozen=True, slots=True)
class Order:
    """The order of one policy. Keys sort the better one first."""

    policy: PolicyName = "fcfs"

    @classmethod
    def chosen(cls, choice: PolicyChoice, *, has_ttft_target: bool) -> Self:
        """has_ttft_target: whether requests that name none have one."""
        if choice == "auto":
            return cls("deadline" if has_ttft_target else "fcfs")
        return cls(choice)

    def tier(self, sequence: Queued) -> tuple[bool, int]:
        return (sequence.is_offline, 0 if self.policy == "fcfs" else sequence.priority)

    def seniority(self, sequence: Queued) -> Key:
        """The last one loses its place first."""
        return (*self.tier(sequence), not sequence.is_begun, sequence.number)

    def queue_key(self, sequence: Queued) -> Key:
        """Sorts the waiting queue; does not change while a sequence waits."""
        if self.policy == "deadline":
            # What began has had its deadline: it is first as well.
            return (*self.tier(sequence), sequence.first_deadline_s, sequence.number)
        return self.seniority(sequence)

    def rank(self, sequence: Queued, now: float, token_s: float) -> Key:
        """Order of prefills, running and waiting. token_s: predicted seconds to prefill one token."""
        if self.policy != "deadline":
            return self.seniority(sequence)
        is_late = self.is_late(sequence, now, token_s)
        due_s = sequence.first_deadline_s
        return (*self.tier(sequence), is_late, sequence.number if is_late else due_s, sequence.number)

    def is_late(self, sequence: Queued, now: float, token_s: float) -> bool:
        """Whether it lets others of its tier go first, since there is no deadline that it could keep.

        One that has lost its place is not late: it goes first.
        """
        if self.policy != "deadline":
            return False
        due_s = sequence.first_deadline_s
        return due_s == math.inf or now + sequence.num_uncomputed_tokens * token_s > due_s > -math.inf

    def is_elders_step(self, elder: Queued, step: int, now: float, token_s: float) -> bool:
        """Whether the elder has its right in the step of that number."""
        if elder.is_offline or not self.is_late(elder, now, token_s):
            return True
        return step % _STEPS_PER_LATE_ELDER == 0

    def ordered(self, waiting: Iterable[Q], now: float, token_s: float) -> Iterator[Q]:
        """The waiting queue, which is sorted by queue_key, by rank."""
        if self.policy != "deadline":
            yield from waiting
            return
        for _, tier in groupby(waiting, key=self.tier):
            yield from self._by_deadline(tier, now, token_s)

    def _by_deadline(self, tier: Iterator[Q], now: float, token_s: float) -> Iterator[Q]:
        """One tier of the waiting queue by rank."""
        late: list[Q] = []
        without: Iterator[Q] = iter(())
        for sequence in tier:
            if sequence.first_deadline_s == math.inf:
                # From here on nobody has a target, and all come by arrival.
                without = chain([sequence], tier)
                break
            if self.is_late(sequence, now, token_s):
                late.append(sequence)
            else:
                yield sequence
        late.sort(key=_number)
        yield from heapq.merge(late, without, key=_number)
