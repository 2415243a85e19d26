"""Which tokens ride in the next step: a pure function over the queues, whatever the policy.

Decodes first, one token each; then prompts, running and waiting ones in the policy's order, cut into chunks that fill
the step or, where decoding sequences have a TPOT target, as much of it as that leaves. A newcomer is admitted when it
fits beside what runs (`policies/admission.py`), or takes the place of running sequences of a worse tier
(`policies/order.py`). When live tokens still outgrow the KV cache, the running sequence last in seniority is preempted:
its KV is dropped, and prompt and generated tokens are computed again once there is room.

Offline sequences take what all of this leaves of the step's time, decodes first: as many as keep it, as predicted,
within the tightest TPOT target, and next to online prompts within a tenth more. The others, those that came last,
keep their KV and wait. A step that prefills offline prompts is short, whatever else it could take: an online one that
comes meanwhile is in the next step that is planned.

The most senior running sequence may preempt all others, so it always moves on, finishes, and makes room.
"""

import heapq
import math
from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic

from xllm_compile.runtime.policies.admission import HORIZON, fits, growth_of
from xllm_compile.runtime.policies.chunk import StepBudget, StepLoad, StepSeconds, largest_chunk, load_of, step_budget
from xllm_compile.runtime.policies.offline import OfflineRules, num_in_time
from xllm_compile.runtime.policies.order import Key, Order
from xllm_compile.runtime.policies.state import Capacity, Limits, S, Schedule


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulingRules:
    """What of scheduling is chosen once."""

    order: Order = field(default_factory=Order)
    admission_horizon: int = HORIZON
    """Decode steps that a newcomer must fit beside what runs; 0 asks for its prompt's room only."""
    min_prefill_tokens: int = 32
    """Prompt tokens that a step takes whatever TPOT targets say, so that prefill always moves on."""
    offline: OfflineRules = field(default_factory=OfflineRules)

    def __post_init__(self) -> None:
        if self.admission_horizon < 0 or self.min_prefill_tokens < 1:
            raise ValueError(
                f"admission_horizon={self.admission_horizon} must be at least 0 and min_prefill_tokens="
                f"{self.min_prefill_tokens} at least 1"
            )


def schedule(
    waiting: Iterable[S],
    running: Sequence[S],
    limits: Limits,
    capacity: Capacity,
    model: StepSeconds,
    *,
    rules: SchedulingRules | None = None,
    now: float = 0.0,
    token_s: float = 0.0,
    elder: S | None = None,
    awaited_s: float = math.inf,
) -> Schedule[S]:
    """Plan one step. ``waiting`` is sorted by the order's queue_key and holds no KV. Changes nothing.

    model predicts step times, token_s is what it says of prefilling one token, elder is as policies/order.py has it,
    awaited_s as policies/chunk.py.
    """
    planner = _Planner(running, limits, capacity, model, rules or SchedulingRules(), now, token_s, elder)
    planner.plan_decodes(awaited_s)
    planner.plan_prefills(waiting)
    return planner.result()


class _Planner(Generic[S]):
    """Working state of one call of schedule()."""

    def __init__(
        self,
        running: Sequence[S],
        limits: Limits,
        capacity: Capacity,
        model: StepSeconds,
        rules: SchedulingRules,
        now: float,
        token_s: float,
        elder: S | None,
    ) -> None:
        self.limits, self.capacity, self.model, self.rules = limits, capacity, model, rules
        self.now, self.token_s, self.elder = now, token_s, elder
        self.running = running
        self.alive_ids = {id(sequence) for sequence in running}
        self.running_ids = frozenset(self.alive_ids)
        self.chunks: dict[int, tuple[S, int]] = {}
        self.preempted: list[S] = []
        self.too_large: list[S] = []
        self.tokens_left = limits.max_num_batched_tokens
        self.blocks_left = capacity.num_free_blocks
        self.blocks_at_start = capacity.num_free_blocks
        """Free before the step's chunks are counted."""
        self.load = StepLoad()
        self.decodes_budget = StepBudget()
        self.budget_s = float("inf")
        self.has_prefill = False
        self.least_prefill_tokens = rules.min_prefill_tokens
        self.offline_decodes: list[S] | None = []
        """Those to be planned when all that is online is; None from then on."""
        self.is_short = False
        """Running sequences had to be preempted for memory: no time for newcomers."""

    @cached_property
    def alive(self) -> list[S]:
        """Running sequences, those admitted in this step included; the last one loses its place first."""
        return sorted(self.running, key=self._seniority)

    def plan_decodes(self, awaited_s: float) -> None:
        decodes: list[S] = []
        offline: list[S] = []
        self.offline_decodes = offline
        for sequence in self.running:
            if sequence.num_uncomputed_tokens == 1:
                (offline if self._gives_way(sequence) else decodes).append(sequence)
        if len(decodes) + len(offline) <= self.blocks_left:
            # Nobody can be short of anything: the usual step, planned without sorting.
            for sequence in decodes:
                self.chunks[id(sequence)] = (sequence, 1)
                self.blocks_left -= sequence.num_computed_tokens % self.capacity.block_tokens == 0
            self.tokens_left -= len(decodes)
        else:
            for sequence in sorted(decodes, key=self._seniority):
                if id(sequence) in self.alive_ids:
                    self._plan_running(sequence)
        online = (one for one, _ in self.chunks.values() if not one.is_offline)
        self.decodes_budget = step_budget(online, self.now, awaited_s)
        if self.decodes_budget.seconds < float("inf"):
            self.load = load_of(self.chunks.values())
            self.budget_s = self.decodes_budget.with_prompts_s(self.model.seconds(self.load))

    def plan_prefills(self, waiting: Iterable[S]) -> None:
        prefills = sorted(
            (s for s in self.running if s.num_uncomputed_tokens > 1 and id(s) in self.alive_ids), key=self._rank
        )
        left = {id(sequence): sequence for sequence in prefills}
        for sequence in heapq.merge(prefills, self._ordered(waiting), key=self._rank):
            if self._gives_way(sequence):
                self._plan_offline_decodes()
            if left.pop(id(sequence), None) is not None:
                self._plan_prefill(sequence)
            elif not self._admit(sequence):
                # Nobody passes the first that does not fit: it would wait for ever.
                break
        for sequence in left.values():
            if self._gives_way(sequence):
                self._plan_offline_decodes()
            self._plan_prefill(sequence)
        self._plan_offline_decodes()

    def _plan_offline_decodes(self) -> None:
        """All that is online is planned: from here on the step's time is for offline sequences."""
        if self.offline_decodes is None:
            return
        decodes = [sequence for sequence in self.offline_decodes if id(sequence) in self.alive_ids]
        self.offline_decodes = None
        self.load = load_of(self.chunks.values())
        if self.has_prefill or self.budget_s < float("inf"):
            self.least_prefill_tokens = 0
        prefill_s = self.model.seconds(self.load) if self.has_prefill else None
        self.budget_s = self.rules.offline.budget_s(self.decodes_budget.seconds, prefill_s)
        for sequence in self._in_time(sorted(decodes, key=self._seniority)):
            if self.tokens_left > 0 and id(sequence) in self.alive_ids:
                self._plan_running(sequence)
        self.load = load_of(self.chunks.values())
        self.budget_s = min(self.budget_s, self.rules.offline.step_s)

    def _in_time(self, decodes: Sequence[S]) -> Sequence[S]:
        """The first of them, as many as the step's budget leaves time for."""
        contexts = [sequence.num_computed_tokens for sequence in decodes]
        return decodes[: num_in_time(self.load, contexts, self.budget_s, self.model)]

    def _gives_way(self, sequence: S) -> bool:
        return sequence.is_offline and sequence is not self.elder

    def result(self) -> Schedule[S]:
        self.preempted.sort(key=lambda sequence: sequence.number)
        plan = Schedule(chunks=list(self.chunks.values()), too_large=self.too_large)
        plan.num_held_back = sum(
            self._gives_way(one) and one.num_uncomputed_tokens > 0 and id(one) not in self.chunks
            for one in self.running
            if id(one) in self.alive_ids
        )
        pays = self.capacity.swap_pays
        for sequence in self.preempted:
            swaps = pays is not None and pays(sequence.num_computed_tokens)
            (plan.swapped if swaps else plan.preempted).append(sequence)
        return plan

    def _plan_prefill(self, sequence: S) -> None:
        if self.tokens_left > 0 and id(sequence) in self.alive_ids:
            self._plan_running(sequence)

    def _plan_running(self, sequence: S) -> None:
        while self._room(sequence) == 0 and self.alive[-1] is not sequence:
            self._preempt(self.alive[-1])
            self.is_short = True
        if self._room(sequence) > 0:
            self._add(sequence)
        elif len(self.alive) == 1:
            self._drop(sequence)
            self.too_large.append(sequence)
        elif sequence.num_uncomputed_tokens == 1:
            # A decode that waits for older ones only holds memory which they are about to need.
            self._preempt(sequence)
            self.is_short = True

    def _admit(self, sequence: S) -> bool:
        """Take the waiting sequence in. False when it has to wait, and all behind it."""
        num_tokens = sequence.num_computed_tokens + sequence.num_uncomputed_tokens
        if self.capacity.blocks(num_tokens) > self.capacity.num_blocks:
            self.too_large.append(sequence)
            return True
        if self.is_short or self._within_budget(sequence, 1) == 0:
            return False
        tier = self.rules.order.tier
        if any(tier(victim) <= tier(sequence) for victim in self.preempted):
            # Somebody better has just lost a place: what is left over there is not for this one.
            return False
        victims = self._victims_for(sequence)
        if victims is None:
            return False
        for victim in victims:
            self._preempt(victim)
        insort(self.alive, sequence, key=self._seniority)
        self.alive_ids.add(id(sequence))
        self._add(sequence)
        return True

    def _victims_for(self, sequence: S) -> list[S] | None:
        """Running sequences of worse tiers whose places the newcomer needs; None where that is not enough."""
        tier = self.rules.order.tier(sequence)
        victims: list[S] = []
        others = list(self.alive)
        while not self._fits(sequence, others, victims):
            if not others or others[-1] is self.elder:
                return None
            if sequence is not self.elder and self.rules.order.tier(others[-1]) <= tier:
                return None
            victims.append(others.pop())
        return victims

    def _fits(self, sequence: S, others: Sequence[S], victims: Sequence[S]) -> bool:
        """Whether the newcomer has a seat, a token of the step and memory beside the others, without the victims."""
        if len(others) + self.capacity.num_held_seqs >= self.limits.max_num_seqs:
            return False
        tokens_back = sum(self.chunks[id(victim)][1] for victim in victims if id(victim) in self.chunks)
        if self.tokens_left + tokens_back == 0:
            return False
        free = self.blocks_at_start + sum(victim.num_kv_blocks for victim in victims)
        free -= self.capacity.num_promised_blocks
        if not others:
            return free > sequence.num_unheld_blocks
        if self._new_blocks(sequence, sequence.num_uncomputed_tokens) > free:
            return False
        horizon = self.rules.admission_horizon
        growths = [growth_of(one, self.capacity, horizon) for one in (*others, sequence)]
        return fits(growths, free, self.capacity.block_tokens)

    def _room(self, sequence: S) -> int:
        """Tokens that the sequence could store now."""
        block_tokens, computed = self.capacity.block_tokens, sequence.num_computed_tokens
        return -computed % block_tokens + (self.blocks_left - sequence.num_unheld_blocks) * block_tokens

    def _within_budget(self, sequence: S, most: int) -> int:
        """How many of ``most`` tokens the step's time budget leaves to a prefill."""
        if self.budget_s == float("inf"):
            return most
        least = 0 if self.has_prefill else min(most, self.least_prefill_tokens)
        return max(least, largest_chunk(self.load, sequence.num_computed_tokens, most, self.budget_s, self.model))

    def _add(self, sequence: S) -> None:
        uncomputed, computed = sequence.num_uncomputed_tokens, sequence.num_computed_tokens
        count = min(uncomputed, sequence.max_chunk_tokens, self.tokens_left, self._room(sequence))
        if uncomputed > 1 or computed == 0:
            count = self._within_budget(sequence, count)
            if count == 0:
                return
            self.has_prefill = True
            self.load = self.load.plus(computed, count)
        self.chunks[id(sequence)] = (sequence, count)
        self.tokens_left -= count
        self.blocks_left -= self._new_blocks(sequence, count)

    def _new_blocks(self, sequence: S, count: int) -> int:
        computed = sequence.num_computed_tokens
        return self.capacity.blocks(computed + count) - self.capacity.blocks(computed) + sequence.num_unheld_blocks

    def _preempt(self, sequence: S) -> None:
        self._drop(sequence)
        self.preempted.append(sequence)

    def _drop(self, sequence: S) -> None:
        """Take the sequence and its KV out of the running set, and out of the step if it was already in."""
        self.alive.remove(sequence)
        self.alive_ids.remove(id(sequence))
        _, count = self.chunks.pop(id(sequence), (sequence, 0))
        self.tokens_left += count
        self.blocks_left += sequence.num_kv_blocks + self._new_blocks(sequence, count)
        self.blocks_at_start += sequence.num_kv_blocks

    def _seniority(self, sequence: S) -> Key:
        return (sequence is not self.elder, *self.rules.order.seniority(sequence))

    def _rank(self, sequence: S) -> Key:
        return (sequence is not self.elder, *self.rules.order.rank(sequence, self.now, self.token_s))

    def _ordered(self, waiting: Iterable[S]) -> Iterable[S]:
        if self.elder is not None and id(self.elder) not in self.running_ids:
            yield self.elder
        for sequence in self.rules.order.ordered(waiting, self.now, self.token_s):
            if sequence is not self.elder:
                yield sequence
