"""Applies the routing policy to live instances, and tells it what became of what it placed."""

import heapq
import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Protocol

from xllm_compile.scheduler import errors
from xllm_compile.scheduler.cluster.state import (
    CachedTokens,
    Fetch,
    Instance,
    InstanceInfo,
    Placement,
    Pool,
    Refusal,
    RequestShape,
)
from xllm_compile.scheduler.policies.copy_times import CopyTimes
from xllm_compile.scheduler.policies.correction import Correction
from xllm_compile.scheduler.policies.fetch import Fetching, FetchRules
from xllm_compile.scheduler.policies.placements import Placements
from xllm_compile.scheduler.policies.routing import RoutingRules, route, shortlist


class Fleet(Protocol):
    """The instances there are (cluster.py)."""

    def usable(self) -> Mapping[Pool, Sequence[str]]:
        """Names of those that take work, by pool."""
        ...

    def find(self, name: str) -> Instance | None:
        """As of now."""
        ...


_FETCH = FetchRules()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Expected:
    info: InstanceInfo
    ttft_s: float
    ttft_slo_s: float | None
    placed_s: float


class Placer:
    """Keys are the caller's, one for each time that a request is placed."""

    def __init__(
        self,
        rules: RoutingRules | None = None,
        clock: Callable[[], float] = time.monotonic,
        fetch: FetchRules | None = _FETCH,
        pick: Callable[[int], int] = random.randrange,
    ) -> None:
        """fetch: None has no instance fetch KV from another. pick(n) draws a number below n."""
        self._rules = rules or RoutingRules()
        self._fetch = fetch
        self._pick = pick
        self._clock = clock
        self._placements = Placements()
        self._ttft = Correction()
        self._copies = CopyTimes()
        self._expected: dict[str, _Expected] = {}
        """Of online ones without a first token yet."""
        self._turn = 0

    def place(
        self,
        key: str,
        request: RequestShape,
        fleet: Fleet,
        cached: Mapping[str, CachedTokens] | None = None,
        *,
        refused: Collection[str] = (),
        lost: Collection[str] = (),
    ) -> Placement | None:
        """None where all that take work have refused.

        cached: what of the prompt each instance has, by name. refused: incarnations that are not asked again. lost:
        those asked only if there is nobody else.

        Raises ApiError where no instance can take it: 400 for ever, 429 for now.
        """
        now = self._clock()
        cached = cached or {}
        usable = fleet.usable()
        is_large = sum(map(len, usable.values())) > self._rules.many_instances
        fetching = None
        if self._fetch is not None and cached:
            fetching = Fetching(request, self._senders(fleet, cached, is_large), cached, self._copies, self._fetch, now)
        chosen: Placement | Refusal | None = None
        for instances in self._views(fleet, usable, cached, is_large):
            willing = [each for each in instances if each.takes_work and each.info.incarnation not in refused]
            asked = [each for each in willing if each.info.incarnation not in lost] or willing
            if not asked:
                continue
            corrected = [replace(each, ttft_ratio=self._ttft.ratio(each.info)) for each in self.loaded(asked)]
            chosen = route(request, corrected, rules=self._rules, cached=cached, turn=self._turn, fetching=fetching)
            if isinstance(chosen, Placement) or chosen.retry_after_s is not None:
                # Where those drawn are too busy, so are the others: looking at all of them for each request that is
                # to be refused would make a busy gateway slow as well.
                break
        if isinstance(chosen, Refusal):
            if chosen.retry_after_s is None:
                raise errors.invalid(chosen.reason, code="context_length_exceeded")
            raise errors.queue_full(chosen.reason, chosen.retry_after_s)
        if chosen is not None:
            self._turn += 1
            self._placements.place(key, request, chosen, now)
            if not request.is_offline:
                # Offline ones wait for online ones, which says nothing of the next online one.
                info = next(instance.info for instance in asked if instance.name == chosen.prefill)
                self._expected[key] = _Expected(
                    info=info, ttft_s=chosen.ttft_s, ttft_slo_s=request.ttft_slo_s, placed_s=now
                )
        return chosen

    def wait_s(self, fetch: Fetch) -> float:
        """How long to wait for what it placed with a fetch."""
        return (self._fetch or _FETCH).wait_s(fetch)

    def copied(self, source: InstanceInfo, target: InstanceInfo, num_tokens: int, seconds: float) -> None:
        """KV of so many tokens went there, or was given up, after so long."""
        self._copies.observe(source, target, num_tokens, seconds, self._clock())

    def loaded(self, instances: Sequence[Instance]) -> list[Instance]:
        """Their loads with what was placed there since they were reported."""
        return self._placements.added(instances, self._clock())

    def moved(self, key: str, request: RequestShape, name: str) -> None:
        """It decodes on that instance from now on."""
        now = self._clock()
        self._placements.place(key, request, Placement(prefill=name, decode=name), now)
        self._placements.first_token(key, now)

    def _views(
        self, fleet: Fleet, usable: Mapping[Pool, Sequence[str]], cached: Mapping[str, CachedTokens], is_large: bool
    ) -> Iterator[list[Instance]]:
        """Instances to choose from: all, or of very many first some that are drawn, then all."""
        if is_large:
            yield _found(fleet, shortlist(usable, cached, self._rules.num_candidates_each, self._pick))
        yield _found(fleet, chain.from_iterable(usable.values()))

    def _senders(self, fleet: Fleet, cached: Mapping[str, CachedTokens], is_large: bool) -> list[Instance]:
        """Who may send of what is cached, also those that take no work; of very many those with most of it."""
        names: Iterable[str] = cached
        if is_large:
            most = self._rules.num_candidates_each
            names = heapq.nlargest(most, cached, key=lambda name: cached[name].device + cached[name].host)
        return _found(fleet, names)

    def first_token(self, key: str) -> None:
        now = self._clock()
        self._placements.first_token(key, now)
        expected = self._expected.pop(key, None)
        if expected is not None and expected.ttft_s > 0:
            self._ttft.observe(expected.info, expected.ttft_s, now - expected.placed_s, ttft_slo_s=expected.ttft_slo_s)

    def finished(self, key: str) -> None:
        """In whatever way."""
        self._placements.finished(key)
        self._expected.pop(key, None)

    def gone(self, info: InstanceInfo) -> None:
        """Forget the instance."""
        self._placements.gone(info.name)
        self._ttft.gone(info)


def _found(fleet: Fleet, names: Iterable[str]) -> list[Instance]:
    return [instance for name in names if (instance := fleet.find(name)) is not None]
