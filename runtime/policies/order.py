"""Who goes first. Online before offline whatever the policy; then

    fcfs      by arrival
    priority  by the request's priority, then by arrival
    deadline  by priority, then by when the first token is due; what cannot be in time any more waits behind what can,
              and so do requests without a target

In each of them a request that began elsewhere goes before those that did not begin: its client is in the middle of an
answer, or has waited in the queue of an instance that was lost, and would wait for as long as a new one does.

A **tier** (offline, or priority) decides who may take whose place: a waiting sequence that of a running one of a
strictly worse tier, and nobody else's. Arrival must not count there, or two sequences would preempt each other in
turns. Within a tier the one that came last loses its place first.

The **elder** is the sequence that came first of all, once it is older than ``starvation_s``. It goes before everything
and is never preempted. So every sequence ends: when those before it have ended it is the elder. Only one at a time has
this right, so a long queue of old offline requests takes one place from the online ones and no more.

Sources: the deadline order with late requests last follows ProServe, arXiv:2512.12928 (urgency), reduced to what needs
no weights; equal priorities never preempting each other is vllm-project/vllm#40004 and #41951.
"""

import heapq
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby
from operator import attrgetter
from typing import Any, Literal, get_args

from xllm_compile.runtime.policies.state import S, Schedulable

PolicyName = Literal["fcfs", "priority", "deadline"]
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)

Key = tuple[Any, ...]

_number = attrgetter("number")


@dataclass(frozen=True, slots=True)
class Order:
    """The order of one policy. Keys sort the better one first."""

    policy: PolicyName = "fcfs"

    def tier(self, sequence: Schedulable) -> tuple[bool, int]:
        return (sequence.is_offline, 0 if self.policy == "fcfs" else sequence.priority)

    def seniority(self, sequence: Schedulable) -> Key:
        """The last one loses its place first."""
        return (*self.tier(sequence), not sequence.is_begun, sequence.number)

    def queue_key(self, sequence: Schedulable) -> Key:
        """Sorts the waiting queue; does not change while a sequence waits."""
        if self.policy == "deadline":
            # What began has had its deadline: it is first as well.
            return (*self.tier(sequence), sequence.first_deadline_s, sequence.number)
        return self.seniority(sequence)

    def rank(self, sequence: Schedulable, now: float, token_s: float) -> Key:
        """Order of prefills, running and waiting. token_s: predicted seconds to prefill one token."""
        if self.policy != "deadline":
            return self.seniority(sequence)
        is_late = self._is_late(sequence, now, token_s)
        due_s = sequence.first_deadline_s
        return (*self.tier(sequence), is_late, sequence.number if is_late else due_s, sequence.number)

    def _is_late(self, sequence: Schedulable, now: float, token_s: float) -> bool:
        """Whether there is no deadline that it could keep. One that has lost its place is not late: it goes first."""
        due_s = sequence.first_deadline_s
        return due_s == math.inf or now + sequence.num_uncomputed_tokens * token_s > due_s > -math.inf

    def ordered(self, waiting: Iterable[S], now: float, token_s: float) -> Iterator[S]:
        """The waiting queue, which is sorted by queue_key, by rank."""
        if self.policy != "deadline":
            yield from waiting
            return
        for _, tier in groupby(waiting, key=self.tier):
            yield from self._by_deadline(tier, now, token_s)

    def _by_deadline(self, tier: Iterator[S], now: float, token_s: float) -> Iterator[S]:
        """One tier of the waiting queue by rank."""
        late: list[S] = []
        without: Iterator[S] = iter(())
        for sequence in tier:
            if sequence.first_deadline_s == math.inf:
                # From here on nobody has a target, and all come by arrival.
                without = chain([sequence], tier)
                break
            if self._is_late(sequence, now, token_s):
                late.append(sequence)
            else:
                yield sequence
        late.sort(key=_number)
        yield from heapq.merge(late, without, key=_number)
