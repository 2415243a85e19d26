"""A simulated instance: prompts in chunks, decodes many steps at a time, KV that is never over-committed.

It plans as `runtime/local_scheduler.py` does, in closed form: decodes first, then prompts in the policy's order, cut so
that the step keeps the TPOT target of what decodes, by the same functions; online before offline. Only where all is
decoding are steps taken together: until the first sequence ends, or something arrives. A test holds it against the
real scheduler, and `xllm-bench simulate validate` against instances that serve.

With async scheduling a step is planned shortly before the one before it ends. What arrives after that rides in the one
after the next, or in the next where otherwise there would be none.
"""

import math
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

from xllm_compile.benchmarks.simulation.decode_batch import DecodeBatch
from xllm_compile.benchmarks.simulation.hardware import Hardware
from xllm_compile.benchmarks.simulation.requests import SimRequest
from xllm_compile.runtime.policies.admission import HORIZON
from xllm_compile.runtime.policies.chunk import StepBudget, StepLoad, awaited_step_s, largest_chunk, step_budget
from xllm_compile.runtime.policies.offline import OfflineRules, num_in_time
from xllm_compile.runtime.policies.order import STARVATION_S, Order
from xllm_compile.runtime.policies.output_length import OutputLength
from xllm_compile.runtime.policies.planning_lead import planning_lead_s
from xllm_compile.runtime.policies.waiting_queue import WaitingQueue
from xllm_compile.scheduler.cluster.state import InstanceLoad, StepProfile

# With --ttft-slo-ms, as instances have it unless told otherwise.
DEFAULT_ORDER = Order("deadline")
# Steps of one load differ by about this much.
_NOISE = 0.03
_LEAST_CHUNK_TOKENS = 32
# Steps until it is asked again how many offline sequences they have time for.
_STEPS_WITH_OFFLINE = 32
# Seconds over which live figures are means.
_RECENT_S = 5.0


@dataclass(slots=True)
class _Recent:
    """A mean that forgets."""

    _sum: float = 0.0
    _weight: float = 0.0
    _at: float = 0.0

    def add(self, value: float, weight: float, now: float) -> None:
        decay = math.exp((self._at - now) / _RECENT_S)
        self._sum, self._weight, self._at = self._sum * decay + value * weight, self._weight * decay + weight, now

    def mean(self, now: float) -> float | None:
        """None where nothing came for a while."""
        return None if self._weight == 0 or now - self._at > 2 * _RECENT_S else self._sum / self._weight


@dataclass(kw_only=True, slots=True)
class _Run:
    """Steps under way."""

    started_s: float
    num_steps: int
    noise: float
    chunks: list[tuple[SimRequest, int]]
    end_s: float


def decode_load(batch: DecodeBatch) -> StepLoad:
    """Of a step of them alone."""
    return StepLoad(len(batch), len(batch), batch.num_context_tokens + len(batch))


class _Model:
    def __init__(self, profile: StepProfile) -> None:
        self.seconds = profile.step_s


@dataclass(slots=True)
class Ended:
    """What the last steps brought to an end."""

    prefilled: list[SimRequest] = field(default_factory=list)
    """Have their next token; the caller says where they decode."""
    finished: list[SimRequest] = field(default_factory=list)


class SimInstance:
    """Times are seconds of the simulation. The caller calls `finish` at `end_s`, and `plan` behind whatever it adds."""

    def __init__(
        self, name: str, hardware: Hardware, truth: StepProfile, seed: str, order: Order = DEFAULT_ORDER
    ) -> None:
        self.name, self.hardware, self.truth, self.order = name, hardware, truth, order
        self.waiting: WaitingQueue[SimRequest] = WaitingQueue(order.queue_key)
        """Prompts that are not through, those included that are being computed."""
        self.waiting_offline: WaitingQueue[SimRequest] = WaitingQueue(order.queue_key)
        self.arriving: deque[SimRequest] = deque()
        """Prefilled elsewhere, and waiting for a place."""
        self.reserving: deque[SimRequest] = deque()
        """Will be, and have asked for one: they are answered when the device is at rest, between two steps."""
        self.awaited: dict[int, SimRequest] = {}
        """Have a place, and may come at any moment, or have come since the next step was planned."""
        self.arriving_offline: deque[SimRequest] = deque()
        self.online, self.offline = DecodeBatch(), DecodeBatch()
        self.paused: list[SimRequest] = []
        """Offline sequences that keep their KV and are left out of steps."""
        self.prefilling: dict[int, SimRequest] = {}
        """Have KV and are not through their prompt, or are through and not yet handed over."""
        self.kv_used = 0
        self.num_waiting_tokens = 0
        self.version = 0
        """Of the run: what was planned to end with another one is void."""
        self.busy_s = 0.0
        self.offline_rules: OfflineRules | None = None
        """None gives offline sequences any place that online ones do not want."""
        self._run: _Run | None = None
        self._known_s = math.inf
        """The next steps are planned with what had arrived until then."""
        self._newest_s = -math.inf
        """When something last arrived."""
        most = hardware.max_num_batched_tokens
        self._token_s = truth.step_s(StepLoad().plus(0, most)) / most
        """To prefill one token."""
        self._granted: list[SimRequest] = []
        self._model = _Model(truth)
        self._output_length = OutputLength()
        self._rng = random.Random(seed)
        self._ttft, self._tpot = _Recent(), _Recent()

    @property
    def end_s(self) -> float | None:
        """When the steps under way are done; None while idle."""
        return self._run.end_s if self._run else None

    @property
    def num_decoding(self) -> int:
        return len(self.online) + len(self.offline)

    # What comes and goes

    def enqueue(self, request: SimRequest, now: float) -> None:
        """To prefill it here."""
        request.queued_s = self._newest_s = now
        self._queue_of(request).add(request)
        self.num_waiting_tokens += request.num_uncomputed_tokens

    def reserve(self, request: SimRequest, now: float) -> None:
        """Ask for a place where it can be decoded once it was prefilled elsewhere; `granted` says when there is one."""
        request.queued_s = self._newest_s = now
        self.reserving.append(request)

    def granted(self) -> list[SimRequest]:
        """Reservations that `plan` has answered since the last call."""
        granted, self._granted = self._granted, []
        return granted

    def hand_in(self, request: SimRequest, now: float) -> None:
        """To decode what was prefilled elsewhere."""
        request.queued_s = self._newest_s = now
        (self.arriving_offline if request.is_offline else self.arriving).append(request)

    def keep(self, request: SimRequest) -> None:
        """Decode what was prefilled here."""
        del self.prefilling[request.number]
        (self.offline if request.is_offline else self.online).add(request)

    def release(self, request: SimRequest) -> None:
        """Its KV is somewhere else by now, or nobody needs it."""
        del self.prefilling[request.number]
        self.kv_used -= request.num_tokens

    def take_offline(self, request: SimRequest) -> None:
        """Stop decoding an offline sequence here, to hand it over; its KV stays until it is released."""
        if request in self.paused:
            self.paused.remove(request)
        else:
            self.offline.remove(request)
        request.num_computed = request.num_tokens
        self.prefilling[request.number] = request

    # Steps

    def plan(self, now: float) -> float | None:
        """Begin the next steps, if none are under way, and say when they end."""
        if self._run is not None:
            self._cut_short(now)
            return self._run.end_s
        self._make_room()
        self._grant()
        chunks, load = self._next_step(now)
        if not chunks and self.num_decoding == 0:
            # There is no step that this one would have been planned beside.
            self._known_s = math.inf
            self._grant()
            chunks, load = self._next_step(now)
        num_steps = 1
        if not chunks:
            if self.num_decoding == 0:
                return None
            num_steps = self._decode_steps()
        noise = max(0.5, self._rng.gauss(1, _NOISE / math.sqrt(num_steps)))
        seconds = self.truth.step_s(load) if chunks else self._decode_s(num_steps)
        self.version += 1
        self._run = _Run(started_s=now, num_steps=num_steps, noise=noise, chunks=chunks, end_s=now + noise * seconds)
        return self._run.end_s

    def finish(self, now: float) -> Ended:
        """The steps under way are done."""
        run, ended = self._run, Ended()
        assert run is not None
        self._run = None
        if self.hardware.is_async:
            before_last_s = self._decode_s(run.num_steps - 1) if run.num_steps > 1 else 0.0
            last_s = now - run.started_s - run.noise * before_last_s
            self._known_s = now - planning_lead_s(last_s)
        self.busy_s += now - run.started_s
        num_decoding = self.num_decoding
        if num_decoding:
            self._tpot.add((now - run.started_s) / run.num_steps, num_decoding * run.num_steps, now)
            self.kv_used += num_decoding * run.num_steps
            for batch in (self.online, self.offline):
                ended.finished += batch.advance(run.num_steps)
        for request in ended.finished:
            self.kv_used -= request.num_tokens
            request.finished_s = now
        for request, count in run.chunks:
            request.num_computed += count
            self.num_waiting_tokens -= count
            if request.num_uncomputed_tokens == 0:
                self._queue_of(request).remove(request)
                self._first_token(request, now, ended)
        for request in ended.finished:
            self._output_length.learn(request.num_output_tokens)
        return ended

    def report(self, now: float, believed: StepProfile) -> InstanceLoad:
        num_waiting = len(self.waiting) + len(self.waiting_offline)
        beside = (*self.arriving_offline, *self.paused)
        num_offline = len(self.offline) + len(beside)
        num_offline_tokens = self.offline.num_context_tokens + sum(one.num_tokens for one in beside)
        # A step's tokens count as computed from its launch on.
        launched = {} if self._run is None else {request.number: count for request, count in self._run.chunks}
        late = [one for one in self.waiting if self.order.is_late(one, now, self._token_s)]
        num_started = sum(not request.num_uncomputed_tokens for request in self.prefilling.values())
        return InstanceLoad(
            num_running=self.num_decoding + len(self.paused) + len(self.prefilling) - num_started,
            num_waiting=num_waiting,
            num_waiting_tokens=self.num_waiting_tokens - sum(launched.values()),
            num_late_waiting_tokens=sum(one.num_uncomputed_tokens - launched.get(one.number, 0) for one in late),
            num_decoding=len(self.online) + len(self.arriving) + num_offline,
            num_context_tokens=self.online.num_context_tokens
            + sum(request.num_tokens for request in self.arriving)
            + num_offline_tokens,
            num_offline=num_offline + len(self.waiting_offline),
            num_offline_waiting_tokens=sum(request.num_uncomputed_tokens for request in self.waiting_offline),
            num_offline_decoding=num_offline,
            num_offline_context_tokens=num_offline_tokens,
            kv_tokens_used=self.kv_used,
            ttft_s=self._ttft.mean(now),
            tpot_s=self._tpot.mean(now),
            profile=believed,
        )

    def check(self) -> None:
        """What always holds."""
        held = sum(request.num_tokens for request in (*self.prefilling.values(), *self.paused))
        assert self.kv_used == held + self.online.num_context_tokens + self.offline.num_context_tokens, self.name
        assert 0 <= self.kv_used <= self.hardware.kv_tokens, (self.name, self.kv_used)
        assert self.num_decoding + len(self.paused) <= self.hardware.max_num_seqs, self.name
        waiting = sum(request.num_uncomputed_tokens for request in (*self.waiting, *self.waiting_offline))
        assert self.num_waiting_tokens == waiting, (self.name, self.num_waiting_tokens, waiting)

    def _first_token(self, request: SimRequest, now: float, ended: Ended) -> None:
        # The token's own KV is counted with it.
        request.num_generated += 1
        request.num_computed += 1
        self.kv_used += 1
        if request.first_token_s is None:
            request.first_token_s = now
            if not request.is_offline:
                self._ttft.add(now - request.arrival_s, 1.0, now)
        if request.num_generated >= request.num_output_tokens:
            request.finished_s = now
            self.release(request)
            ended.finished.append(request)
        else:
            ended.prefilled.append(request)

    def _is_known(self, request: SimRequest) -> bool:
        """Whether it had arrived when the next step was planned."""
        return request.queued_s <= self._known_s

    def _grant(self) -> None:
        while self.reserving and self._is_known(self.reserving[0]):
            request = self.reserving.popleft()
            self._granted.append(request)
            self.awaited[request.number] = request
            # The device comes to rest for it: what is planned then is planned with all there is.
            self._known_s = math.inf

    def _next_step(self, now: float) -> tuple[list[tuple[SimRequest, int]], StepLoad]:
        """Its prompts, and its load with those of what decodes."""
        self._admit_arriving()
        budget = self._budget(now)
        prompts_s = budget.with_prompts_s(self.truth.step_s(decode_load(self.online)))
        if self.offline_rules is None:
            return self._chunks(self._in_turn(now, False, True), self._decode_load(), prompts_s)
        chunks, load = self._chunks(self._in_turn(now, False), decode_load(self.online), prompts_s)
        has_online = bool(chunks) or budget.seconds < math.inf
        budget_s = self.offline_rules.budget_s(budget.seconds, self.truth.step_s(load) if chunks else None)
        load = self._balance_offline(load, budget_s)
        budget_s = min(budget_s, self.offline_rules.step_s)
        more, load = self._chunks(
            self._in_turn(now, True), load, budget_s, least_tokens=0 if has_online else _LEAST_CHUNK_TOKENS
        )
        return chunks + more, load

    def _budget(self, now: float) -> StepBudget:
        if not (self.waiting or self.waiting_offline or len(self.offline) or self.paused):
            # It does not matter how late who decodes is.
            return StepBudget()
        steps_s = (
            awaited_step_s(one.tpot_slo_s, self._output_length.expected(one.max_output_tokens))
            for one in self.awaited.values()
            if one.tpot_slo_s is not None
        )
        return step_budget(self.online.members(), now, min(steps_s, default=math.inf))

    def _admit_arriving(self) -> None:
        for queue, batch in ((self.arriving, self.online), (self.arriving_offline, self.offline)):
            while queue and self._is_known(queue[0]) and self._has_room(queue[0]):
                request = queue.popleft()
                self.awaited.pop(request.number, None)
                self.kv_used += request.num_tokens
                batch.add(request)

    def _balance_offline(self, load: StepLoad, budget_s: float) -> StepLoad:
        """Let as many offline sequences decode in the next steps as those have time for; the load with them."""
        offline = sorted([*self.offline.members(), *self.paused], key=lambda one: one.number)
        most = self.hardware.max_num_batched_tokens - load.num_tokens
        count = min(most, num_in_time(load, [one.num_tokens for one in offline], budget_s, self._model))
        in_time = {one.number for one in offline[:count]}
        for request in self.offline.members():
            if request.number not in in_time:
                self.offline.remove(request)
        for request in self.paused:
            if request.number in in_time:
                self.offline.add(request)
        self.paused = offline[count:]
        num_keys = load.num_keys + decode_load(self.offline).num_keys
        return StepLoad(load.num_tokens + count, load.num_seqs + count, num_keys, load.num_pairs)

    def _has_room(self, request: SimRequest) -> bool:
        """Whether it can join beside what decodes, all growing for a while. Offline ones make room for others."""
        while True:
            num_seqs = self.num_decoding + len(self.prefilling) + len(self.paused) + 1
            wanted = self.kv_used + request.num_tokens + HORIZON * num_seqs
            if num_seqs <= self.hardware.max_num_seqs and wanted <= self.hardware.kv_tokens:
                return True
            if num_seqs == 1:
                return request.num_tokens + 1 < self.hardware.kv_tokens
            if request.is_offline or not self._drop_offline():
                return False

    def _drop_offline(self) -> bool:
        """Give up the KV of the offline sequence that came last; it is computed again."""
        started = [one for one in self.prefilling.values() if one.is_offline and one.num_uncomputed_tokens]
        if started:
            # It waits already, in its queue.
            self.release(started[-1])
            self.num_waiting_tokens += started[-1].num_computed
            started[-1].num_computed = 0
            return True
        if self.paused:
            request = self.paused.pop()
        elif len(self.offline):
            request = self.offline.last()
            self.offline.remove(request)
        else:
            return False
        self._again(request)
        return True

    def _again(self, request: SimRequest) -> None:
        """Its KV is dropped: it is prefilled anew, before what has not begun."""
        self.kv_used -= request.num_tokens
        request.num_computed = 0
        request.num_preemptions += 1
        request.prefill = request.decode = self.name
        request.queued_s = -math.inf
        self._queue_of(request).add(request)
        self.num_waiting_tokens += request.num_uncomputed_tokens

    def _decode_load(self) -> StepLoad:
        online, offline = decode_load(self.online), decode_load(self.offline)
        num_seqs = online.num_seqs + offline.num_seqs
        return StepLoad(num_seqs, num_seqs, online.num_keys + offline.num_keys)

    def _chunks(
        self,
        prompts: Iterator[SimRequest],
        load: StepLoad,
        budget_s: float,
        *,
        least_tokens: int = _LEAST_CHUNK_TOKENS,
    ) -> tuple[list[tuple[SimRequest, int]], StepLoad]:
        """Prompts of the next step, and its load with them."""
        chunks: list[tuple[SimRequest, int]] = []
        tokens_left = self.hardware.max_num_batched_tokens - load.num_tokens
        while tokens_left > 0 and (request := next(prompts, None)) is not None:
            most = min(request.num_uncomputed_tokens, tokens_left)
            count = most
            if budget_s < math.inf:
                least = 0 if chunks else min(most, least_tokens)
                count = max(least, largest_chunk(load, request.num_computed, most, budget_s, self._model))
            if count == 0:
                break
            chunks.append((request, count))
            load = load.plus(request.num_computed, count)
            tokens_left -= count
            if count < request.num_uncomputed_tokens:
                break
        return chunks, load

    def _in_turn(self, now: float, *kinds: bool) -> Iterator[SimRequest]:
        """Prompts in their order, each admitted as it is asked for; kinds: is_offline of those that are wanted.

        Nobody passes the first that does not fit, but for those that are being computed.
        """
        queues = (self.waiting_offline if is_offline else self.waiting for is_offline in kinds)
        ordered = self.order.ordered(chain.from_iterable(queues), now, self._token_s)
        elder = self._elder(now)
        if elder is not None and elder.is_offline in kinds:
            ordered = chain([elder], (one for one in ordered if one is not elder))
        asked = set()
        for request in ordered:
            if request.number not in self.prefilling:
                if not self._is_known(request):
                    continue
                if not self._admit(request):
                    break
            asked.add(request.number)
            yield request
        for request in list(self.prefilling.values()):
            if request.is_offline in kinds and request.num_uncomputed_tokens and request.number not in asked:
                yield request

    def _elder(self, now: float) -> SimRequest | None:
        """The oldest of the online prompts, where it goes before everything: runtime/policies/order.py."""
        elder = min(self.waiting, key=lambda one: one.number, default=None)
        if elder is None or now - elder.arrival_s <= STARVATION_S:
            return None
        if any(one.number < elder.number for one in self.online.members()):
            return None
        return elder if self.order.is_elders_step(elder, self.version, now, self._token_s) else None

    def _queue_of(self, request: SimRequest) -> WaitingQueue[SimRequest]:
        return self.waiting_offline if request.is_offline else self.waiting

    def _admit(self, request: SimRequest) -> bool:
        """Hold KV for the whole prompt."""
        if request.decode == self.name:
            if not self._has_room(request):
                return False
        else:
            while self._next_kv() + request.num_tokens + 1 > self.hardware.kv_tokens:
                if request.is_offline or not self._drop_offline():
                    return False
        self.prefilling[request.number] = request
        self.kv_used += request.num_tokens
        return True

    def _next_kv(self) -> int:
        """KV tokens behind the next step: everybody may get one."""
        return self.kv_used + self.num_decoding + len(self.prefilling)

    def _make_room(self) -> None:
        """Preempt until the next step's tokens have a place."""
        while self._next_kv() > self.hardware.kv_tokens and self.num_decoding > 1:
            if not self._drop_offline():
                request = self.online.last()
                self.online.remove(request)
                self._again(request)

    def _decode_steps(self) -> int:
        """Steps until something changes: an end, or no room for the next token."""
        if self._newest_s > self._known_s:
            return 1
        room = (self.hardware.kv_tokens - self.kv_used) // self.num_decoding
        if self.paused:
            # They may be in the next step again.
            return 1
        if self.offline_rules is not None and len(self.offline):
            # Contexts grow, and with them the step.
            room = min(room, _STEPS_WITH_OFFLINE)
        ends = [batch.steps_to_end() for batch in (self.online, self.offline) if len(batch)]
        return max(1, min(room, *ends))

    def _decode_s(self, num_steps: int) -> float:
        """Of so many steps, contexts growing."""
        load = self._decode_load()
        grown = load.num_seqs * num_steps * (num_steps - 1) / 2
        return num_steps * self.truth.step_s(load) + self.truth.key_s * grown

    def _cut_short(self, now: float) -> None:
        """Somebody waits: the steps end with the one that is running, or that is planned already."""
        run = self._run
        assert run is not None
        if run.chunks or run.num_steps == 1:
            return
        low, high = 1, run.num_steps
        while low < high:
            middle = (low + high) // 2
            if run.started_s + run.noise * self._decode_s(middle) >= now:
                high = middle
            else:
                low = middle + 1
        if self.hardware.is_async:
            end_s = run.started_s + run.noise * self._decode_s(low)
            last_s = run.noise * (self._decode_s(low) - self._decode_s(low - 1))
            low += now > end_s - planning_lead_s(last_s)
        if low < run.num_steps:
            run.num_steps, run.end_s = low, run.started_s + run.noise * self._decode_s(low)
            self.version += 1
