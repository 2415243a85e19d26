"""Applies the routing policy to live instances, and tells it what became of what it placed."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from xllm_compile.scheduler import errors
from xllm_compile.scheduler.cluster.state import (
    CachedTokens,
    Fetch,
    Instance,
    InstanceInfo,
    Placement,
    Refusal,
    RequestShape,
)
from xllm_compile.scheduler.policies.copy_times import CopyTimes
from xllm_compile.scheduler.policies.correction import Correction
from xllm_compile.scheduler.policies.fetch import Fetching, FetchRules
from xllm_compile.scheduler.policies.placements import Placements
from xllm_compile.scheduler.policies.routing import RoutingRules, route

_FETCH = FetchRules()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Expected:
    info: InstanceInfo
    ttft_s: float
    placed_s: float


class Placer:
    """Keys are the caller's, one for each time that a request is placed."""

    def __init__(
        self,
        rules: RoutingRules | None = None,
        clock: Callable[[], float] = time.monotonic,
        fetch: FetchRules | None = _FETCH,
    ) -> None:
        """fetch: None has no instance fetch KV from another."""
        self._rules = rules or RoutingRules()
        self._fetch = fetch
        self._clock = clock
        self._placements = Placements()
        self._ttft = Correction()
        self._copies = CopyTimes()
        self._expected: dict[str, _Expected] = {}
        """Of those without a first token yet."""
        self._turn = 0

    def place(
        self,
        key: str,
        request: RequestShape,
        instances: Sequence[Instance],
        cached: Mapping[str, CachedTokens] | None = None,
        senders: Iterable[Instance] = (),
    ) -> Placement:
        """cached: what of the prompt each instance has, by name. senders: who may send of that, whoever takes work.

        Raises ApiError where no instance can take it: 400 for ever, 429 for now.
        """
        now = self._clock()
        corrected = [
            replace(instance, ttft_ratio=self._ttft.ratio(instance.info)) for instance in self.loaded(instances)
        ]
        fetching = None
        if self._fetch is not None and cached:
            fetching = Fetching(request, senders, cached, self._copies, self._fetch, now)
        chosen = route(request, corrected, rules=self._rules, cached=cached, turn=self._turn, fetching=fetching)
        if isinstance(chosen, Refusal):
            if chosen.retry_after_s is None:
                raise errors.invalid(chosen.reason, code="context_length_exceeded")
            raise errors.queue_full(chosen.reason, chosen.retry_after_s)
        self._turn += 1
        self._placements.place(key, request, chosen, now)
        info = next(instance.info for instance in instances if instance.name == chosen.prefill)
        self._expected[key] = _Expected(info=info, ttft_s=chosen.ttft_s, placed_s=now)
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

    def first_token(self, key: str) -> None:
        now = self._clock()
        self._placements.first_token(key, now)
        expected = self._expected.pop(key, None)
        if expected is not None and expected.ttft_s > 0:
            self._ttft.observe(expected.info, expected.ttft_s, now - expected.placed_s)

    def finished(self, key: str) -> None:
        """In whatever way."""
        self._placements.finished(key)
        self._expected.pop(key, None)

    def gone(self, info: InstanceInfo) -> None:
        """Forget the instance."""
        self._placements.gone(info.name)
        self._ttft.gone(info)
