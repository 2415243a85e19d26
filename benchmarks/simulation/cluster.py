"""The service: requests arrive, are routed, prefilled, handed over and decoded; roles are decided on the way.

What the gateway and the master do here is what they do when serving, by the same functions (`scheduler/policies/`),
on loads as old as reports are. Events are few: a request's arrival, its prompt's chunks, its hand-over, its end.
"""

import heapq
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from xllm_compile.benchmarks.simulation.hardware import Hardware
from xllm_compile.benchmarks.simulation.instance import DEFAULT_ORDER, SimInstance
from xllm_compile.benchmarks.simulation.requests import SimRequest
from xllm_compile.runtime.policies.offline import OfflineRules
from xllm_compile.runtime.policies.order import Order
from xllm_compile.scheduler.cluster.state import (
    Instance,
    InstanceInfo,
    InstanceLoad,
    Pool,
    Refusal,
    RequestShape,
    Role,
)
from xllm_compile.scheduler.policies.colocation import ColocationRules, pulls
from xllm_compile.scheduler.policies.correction import Correction
from xllm_compile.scheduler.policies.placements import Placements
from xllm_compile.scheduler.policies.roles import RoleRules, Roles, decide
from xllm_compile.scheduler.policies.routing import RoutingRules, route, shortlist


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterRules:
    """How the service is run."""

    routing: RoutingRules
    roles: RoleRules | None = None
    """None leaves everybody in its pool."""
    colocation: ColocationRules | None = None
    """None routes and hands over offline requests like any others."""
    order: Order = DEFAULT_ORDER
    """In which instances compute prompts."""
    report_s: float = 0.25
    """Loads are as old as this."""
    roles_s: float = 0.5
    """Between two decisions on roles."""
    truth_factor: float = 1.1
    """Steps take so many times what instances believe."""


@dataclass(kw_only=True, slots=True)
class _Seen:
    """An instance's last report."""

    load: InstanceLoad
    at_s: float


@dataclass(kw_only=True)
class Cluster:
    hardware: Hardware
    pools: Sequence[Pool]
    """Of the instances at the start."""
    rules: ClusterRules
    seed: int = 0
    checks: bool = False
    """Whether what must hold is checked after every event."""
    now: float = 0.0
    num_flips: int = 0
    timeline: list[tuple[float, int, int]] = field(default_factory=list)
    """Time, instances that take prefills, instances that take decodes; where they change."""

    def __post_init__(self) -> None:
        truth = self.hardware.truth(self.rules.truth_factor)
        self.instances: dict[str, SimInstance] = {}
        self.infos: dict[str, InstanceInfo] = {}
        self.pool_of: dict[str, Pool] = {}
        for index, pool in enumerate(self.pools):
            name = f"i{index:04}"
            self.instances[name] = SimInstance(name, self.hardware, truth, f"{self.seed}-{name}", self.rules.order)
            self.infos[name] = InstanceInfo(
                name=name,
                incarnation="1",
                role=Role.MIX,
                address=name,
                max_model_len=self.hardware.max_model_len,
                max_num_seqs=self.hardware.max_num_seqs,
                max_num_batched_tokens=self.hardware.max_num_batched_tokens,
                kv_tokens_total=self.hardware.kv_tokens,
                transfers=("link",),
            )
            self.pool_of[name] = pool
            if self.rules.colocation is not None:
                self.instances[name].offline_rules = OfflineRules.within(self.rules.colocation.tpot_slo_s)
        self._sort_out()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self.num_events = 0
        self._seen: dict[str, _Seen] = {}
        self._placements = Placements()
        self._correction = Correction()
        self._turn = 0
        self._num_open = 0
        self._roles = Roles()
        self._rng = random.Random(self.seed)
        self._note_pools()

    def run(self, requests: Sequence[SimRequest]) -> None:
        """Serve all of them, given in order of arrival."""
        arrivals = iter(requests)
        self._num_open = len(requests)
        self._next_arrival(arrivals)
        decisions = [(self.rules.roles, self._decide_roles), (self.rules.colocation, self._pull_offline)]
        repeated = [event for rules, event in decisions if rules is not None]
        for event in repeated:
            self._at(0.0, event)
        while self._num_open:
            # These go on for ever.
            assert len(self._events) > len(repeated), f"{self._num_open} requests are stuck"
            self.now, _, event = heapq.heappop(self._events)
            event()
            if self.checks:
                for instance in self.instances.values():
                    instance.check()

    # Events

    def _at(self, time_s: float, event: Callable[[], None]) -> None:
        self.num_events += 1
        heapq.heappush(self._events, (time_s, self.num_events, event))

    def _next_arrival(self, arrivals: Iterator[SimRequest]) -> None:
        request = next(arrivals, None)
        if request is not None:

            def arrive() -> None:
                self._next_arrival(arrivals)
                self._arrive(request)

            self._at(request.arrival_s, arrive)

    def _arrive(self, request: SimRequest) -> None:
        shape = RequestShape(
            num_prompt_tokens=request.num_prompt_tokens,
            max_output_tokens=request.max_output_tokens,
            ttft_slo_s=request.ttft_slo_s,
            tpot_slo_s=request.tpot_slo_s,
            is_offline=request.is_offline and self.rules.colocation is not None,
        )
        placement = route(shape, self._candidates(), rules=self.rules.routing, turn=self._turn)
        self._turn += 1
        if isinstance(placement, Refusal):
            request.is_refused = True
            self._num_open -= 1
            return
        request.prefill, request.decode = placement.prefill, placement.decode
        request.predicted_ttft_s = placement.ttft_s
        self._placements.place(str(request.number), shape, placement, self.now)
        come = self._enqueue if request.prefill == request.decode else self._reserve
        self._at(self.now + self.hardware.gateway_s, lambda: come(request))

    def _enqueue(self, request: SimRequest) -> None:
        prefill = self.instances[request.prefill]
        prefill.enqueue(request, self.now)
        self._plan(prefill)

    def _reserve(self, request: SimRequest) -> None:
        decode = self.instances[request.decode]
        decode.reserve(request, self.now)
        self._plan(decode)

    def _plan(self, instance: SimInstance) -> None:
        before = instance.version
        end_s = instance.plan(self.now)
        for request in instance.granted():
            self._at(self.now + self.hardware.reserve_s, partial(self._enqueue, request))
        if end_s is not None and instance.version != before:
            version = instance.version
            self._at(end_s, lambda: self._steps_end(instance, version))

    def _steps_end(self, instance: SimInstance, version: int) -> None:
        if version != instance.version or instance.end_s is None:
            return
        ended = instance.finish(self.now)
        for request in ended.prefilled:
            self._prefilled(instance, request)
        for request in ended.finished:
            if request.num_output_tokens == 1:
                self._observe(request)
            self._placements.finished(str(request.number))
            self._num_open -= 1
        self._plan(instance)

    def _prefilled(self, instance: SimInstance, request: SimRequest) -> None:
        if request.num_generated == 1:
            self._observe(request)
        self._placements.first_token(str(request.number), self.now)
        if request.decode == instance.name:
            instance.keep(request)
            return
        # Chunks before the last one were sent while later ones were computed.
        last_tokens = min(request.num_tokens, self.hardware.max_num_batched_tokens)
        self._at(self.now + self.hardware.hand_over_s(last_tokens), lambda: self._handed_over(instance, request))

    def _handed_over(self, source: SimInstance, request: SimRequest) -> None:
        source.release(request)
        target = self.instances[request.decode]
        target.hand_in(request, self.now)
        self._plan(source)
        self._plan(target)

    def _observe(self, request: SimRequest) -> None:
        if request.first_token_s is not None and not request.is_offline:
            self._correction.observe(
                self.infos[request.prefill],
                request.predicted_ttft_s,
                request.first_token_s - request.arrival_s,
                ttft_slo_s=request.ttft_slo_s,
            )

    def _decide_roles(self) -> None:
        assert self.rules.roles is not None
        self._roles = decide(self._view(), self._roles, self.rules.roles, self.now)
        if self._roles.pools != self.pool_of:
            self.num_flips += sum(
                pool in (Pool.PREFILL_TO_DECODE, Pool.DECODE_TO_PREFILL) and self.pool_of[name] is not pool
                for name, pool in self._roles.pools.items()
            )
            self.pool_of.update(self._roles.pools)
            self._sort_out()
            self._note_pools()
        self._at(self.now + self.rules.roles_s, self._decide_roles)

    def _sort_out(self) -> None:
        """By pools."""
        self._members: dict[Pool, list[str]] = {}
        for name in self.instances:
            self._members.setdefault(self.pool_of[name], []).append(name)

    def _pull_offline(self) -> None:
        assert self.rules.colocation is not None
        self._at(self.now + self.rules.colocation.period_s, self._pull_offline)
        lengths: dict[str, dict[str, int]] = {}
        movable: dict[str, tuple[SimInstance, SimRequest]] = {}
        for instance in self.instances.values():
            for request in (*instance.offline.members(), *instance.paused):
                key = str(request.number)
                movable[key] = instance, request
                lengths.setdefault(instance.name, {})[key] = request.num_tokens
        for key, target in pulls(self._view(), lengths, self.rules.colocation):
            self._migrate(*movable[key], target)

    def _migrate(self, source: SimInstance, request: SimRequest, target: str) -> None:
        source.take_offline(request)
        request.decode = target
        arrive = partial(self._handed_over, source, request)
        self._at(self.now + self.hardware.hand_over_s(request.num_tokens), arrive)

    # What the gateway knows

    def _candidates(self) -> list[Instance]:
        """For one request: all, or some of very many."""
        rules = self.rules.routing
        if len(self.instances) <= rules.many_instances:
            return self._view()
        names = shortlist(self._members, {}, rules.num_candidates_each, self._rng.randrange)
        return self._placements.added([self._instance(name) for name in names], self.now)

    def _view(self) -> list[Instance]:
        return self._placements.added([self._instance(name) for name in self.instances], self.now)

    def _instance(self, name: str) -> Instance:
        seen = self._seen.get(name)
        if seen is None or self.now - seen.at_s >= self.rules.report_s:
            load = self.instances[name].report(self.now, self.hardware.profile)
            seen = self._seen[name] = _Seen(load=load, at_s=self.now)
        info = self.infos[name]
        return Instance(
            info=info,
            pool=self.pool_of[name],
            load=seen.load,
            load_age_s=self.now - seen.at_s,
            ttft_ratio=self._correction.ratio(info),
        )

    def _note_pools(self) -> None:
        view = [self._instance(name) for name in self.instances]
        counts = sum(one.takes_prefills for one in view), sum(one.takes_decodes for one in view)
        if not self.timeline or self.timeline[-1][1:] != counts:
            self.timeline.append((self.now, *counts))


def attainment(requests: Sequence[SimRequest]) -> float:
    """Share of the requests with targets that met them."""
    online = [request for request in requests if request.ttft_slo_s is not None]
    return sum(request.is_met for request in online) / max(1, len(online))
