"""Whether an instance should have the beginning of a prompt's KV sent by another one instead of computing it.

It should where the copy, at the speed that copies had lately (`copy_times.py`), is predicted to be sooner done than the
computation on that instance. A prompt is looked at on every instance, so of those that have the most of it only one is
asked; whoever gets a copy has it for the next one, and a popular prefix spreads by itself.

Source: Mooncake (arXiv:2407.00079), 6.2, which balances between transfer and computation in the same place.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from xllm_compile.scheduler.cluster.state import CachedTokens, Fetch, Health, Instance, RequestShape
from xllm_compile.scheduler.policies import predict
from xllm_compile.scheduler.policies.copy_times import CopyTimes


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchRules:
    margin: float = 0.8
    """Share of the time it spares that a copy may take; the rest is for the error of both predictions."""
    least_wait_s: float = 1.0
    """A copy is waited for as long as computing would take, and at least so long."""

    def __post_init__(self) -> None:
        if not 0 < self.margin <= 1 or self.least_wait_s < 0:
            raise ValueError(f"margin={self.margin} must be in (0, 1], least_wait_s={self.least_wait_s} at least 0")

    def wait_s(self, fetch: Fetch) -> float:
        """After which the prompt is computed, whatever has become of the copy."""
        return max(self.least_wait_s, fetch.spared_s)


class Fetching:
    """What the instances can have of one prompt from each other."""

    def __init__(
        self,
        request: RequestShape,
        senders: Iterable[Instance],
        cached: Mapping[str, CachedTokens],
        copies: CopyTimes,
        rules: FetchRules,
        now: float,
    ) -> None:
        """senders: those that are there, also those that take no work. cached: what of the prompt each has."""
        self._request, self._copies, self._rules, self._now = request, copies, rules, now
        found = [(one, each.device + each.host) for one in senders if (each := cached.get(one.name)) and _sends(one)]
        # The longest prefix first, of equals who has less to do. What is on disk would have to be read first.
        self._sources = sorted(found, key=lambda each: (-each[1], each[0].load.num_running + each[0].load.num_waiting))

    def best(self, target: Instance, own: CachedTokens) -> Fetch | None:
        """What the target, which has its own, should have sent; None where it computes what it lacks."""
        request, info, num_own = self._request, target.info, own.device + own.host
        if target.load.profile is None or not info.transfers:
            return None
        # The last token is computed in any case.
        most = (request.num_prompt_tokens - 1) // info.block_tokens * info.block_tokens
        for source, num_found in self._sources:
            num_tokens = min(num_found, most)
            if num_tokens <= num_own:
                return None
            if source.name != target.name and source.info.has_kv_like(info):
                break
        else:
            return None
        copy_s = self._copies.seconds(source.info, info, num_tokens - num_own, self._now)
        ways = (own, CachedTokens(device=num_tokens))
        without_s, with_s = (predict.ttft_s(target, request, cached) * target.ttft_ratio for cached in ways)
        if copy_s > self._rules.margin * (without_s - with_s):
            return None
        return Fetch(source=source.name, num_tokens=num_tokens, copy_s=copy_s, spared_s=without_s - with_s)


def _sends(instance: Instance) -> bool:
    info = instance.info
    return instance.health is not Health.SUSPECT and bool(info.transfers) and info.kv_bytes_per_token > 0
