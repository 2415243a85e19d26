"""Which instances a request goes to: prefill and decode chosen together, at admission.

    round_robin   the next one in turn
    load          prefill where fewest prompt tokens wait, decode where least of the KV cache is taken
    prefix        where the first tokens are out soonest, counting what the prefix cache spares there
    slo           likewise, among those that keep the targets; where prefill takes long, decoding instances with
                  slack do it too

Common to all: SUSPECT and draining instances get nothing; a long request goes only where it fits; decoding stays where
the prompt was computed if that costs nothing; offline requests go, as a whole, to the instances that prefill, whose
steps may take long, or with co-location to any (`colocation.py`). Nobody is chosen for a cached prefix whose queue
takes longer than the prefix spares: both are seconds of the same sum, so a popular prefix spreads.
What another instance has of a prompt counts as cached after the time of its copy, where copying pays (`fetch.py`).

Sources: the prefix by its share rather than all or nothing, xLLM's unfulfilled 3.4 (arXiv:2510.14686); spill of
prefills to decoding instances and the choice by predicted interval, its SLO-aware policy; the best of those that keep
the target instead of the first, which fills one instance up to the brim.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from xllm_compile.runtime.policies.queue_bound import OFFLINE_SHARE
from xllm_compile.scheduler.cluster.state import CachedTokens, Fetch, Instance, Placement, Pool, Refusal, RequestShape
from xllm_compile.scheduler.policies import predict
from xllm_compile.scheduler.policies.fetch import Fetching

PolicyName = Literal["round_robin", "load", "prefix", "slo"]
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)

# Tokens whose time counts where instances prefill and decode: enough for a decode batch to weigh, few enough for a
# queue to weigh more.
_FIRST_TOKENS = 64
_NOTHING = CachedTokens()


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingRules:
    """What of routing is chosen once."""

    policy: PolicyName = "slo"
    max_wait_s: float = 60.0
    """A request whose first token would take longer than this and its target everywhere is refused; an offline one
    at half of it, as it may fill half of a queue."""
    local_prefill_tokens: int = 256
    """A prompt with no more than so many tokens to compute is prefilled where it is decoded, if its target is kept."""
    spreads_offline: bool = False
    """Whether offline requests go to decoding instances too, which keep the targets of what decodes there."""
    ttft_margin: float = 0.8
    """Share of the TTFT target that predictions may take up; the rest is for their error. Likewise tpot_margin."""
    tpot_margin: float = 0.9
    spill_share: float = 0.25
    """Where the first token would take more than this share of the TTFT target, decoding instances with slack prefill
    too: early, since their slack is taken up in many short steps, and a queue that is late already stays so."""
    many_instances: int = 64
    """Up to so many are all looked at for each request; of more, these few:"""
    num_candidates_each: int = 8
    """of each pool, and of those with the longest prefixes."""

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy={self.policy!r} must be one of {', '.join(POLICIES)}")
        if self.max_wait_s <= 0 or self.local_prefill_tokens < 0:
            raise ValueError(
                f"max_wait_s={self.max_wait_s} must be positive, local_prefill_tokens={self.local_prefill_tokens} "
                "at least 0"
            )
        if self.num_candidates_each < 2:
            raise ValueError(f"num_candidates_each={self.num_candidates_each} must be at least 2, to choose from")
        for name in ("ttft_margin", "tpot_margin", "spill_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0 and at most 1")


class _Choice(NamedTuple):
    """Where the prompt would be computed, and when its first token would be there."""

    instance: Instance
    ttft_s: float
    """Corrected by the instance's ratio."""
    cached: CachedTokens
    """With what is fetched."""
    fetch: Fetch | None


def route(
    request: RequestShape,
    instances: Sequence[Instance],
    *,
    rules: RoutingRules,
    cached: Mapping[str, CachedTokens] | None = None,
    turn: int = 0,
    fetching: Fetching | None = None,
) -> Placement | Refusal:
    """Choose for one request.

    instances: their loads with what was sent there since (`placements.py`). cached: what of the prompt each has.
    turn: how many requests came before; where several are as good it takes them in turns. fetching: what they can have
    from others; without, none fetches.
    """
    router = _Router(request, instances, rules, cached or {}, turn, fetching)
    return router.route()


class _Router:
    """Working state of one call of route()."""

    def __init__(
        self,
        request: RequestShape,
        instances: Sequence[Instance],
        rules: RoutingRules,
        cached: Mapping[str, CachedTokens],
        turn: int,
        fetching: Fetching | None,
    ) -> None:
        self.request, self.rules, self.cached = request, rules, cached
        first = turn % max(1, len(instances))
        self.all = [*instances[first:], *instances[:first]] if rules.policy != "round_robin" else list(instances)
        self.turn = turn
        self.fetching = fetching
        self.up = [instance for instance in self.all if instance.takes_work]
        self.fitting = [instance for instance in self.up if _fits(instance, request)]

    def route(self) -> Placement | Refusal:
        if not self.fitting:
            return self._nobody()
        prefills = [instance for instance in self.fitting if instance.takes_prefills]
        decodes = [instance for instance in self.fitting if instance.takes_decodes]
        # A pool that is empty or too small for this one is replaced by whoever there is: all of them can do both.
        if self.request.is_offline:
            return self._whole(self.fitting if self.rules.spreads_offline else prefills or decodes)
        return self._choose(prefills or decodes, decodes or prefills)

    def _choose(self, prefills: list[Instance], decodes: list[Instance]) -> Placement | Refusal:
        if self.rules.policy == "round_robin":
            return self._pair(self._choice(prefills[self.turn % len(prefills)]), decodes)
        if self.rules.policy == "load":
            return self._pair(self._choice(min(prefills, key=_waiting_share)), decodes)
        if self.rules.policy == "slo":
            best = min(map(self._choice, prefills), key=self._slo_key)
            local = self._local(decodes, best)
            if local is not None:
                return self._placed(local, local.instance)
            return self._pair(self._spilled(best, decodes), decodes)
        return self._pair(min(map(self._choice, prefills), key=self._first_tokens_s), decodes)

    def _pair(self, prefill: _Choice, decodes: list[Instance]) -> Placement | Refusal:
        """With where it is decoded."""
        if prefill.instance in decodes and (prefill.instance.pool is Pool.MIX or self._keeps_tpot(prefill.instance)):
            return self._placed(prefill, prefill.instance)
        others = [one for one in decodes if prefill.instance.info.has_kv_like(one.info)] or [prefill.instance]
        if self.rules.policy == "round_robin":
            return self._placed(prefill, others[self.turn % len(others)])
        if self.rules.policy == "load":
            return self._placed(prefill, min(others, key=_kv_share))
        return self._placed(prefill, min(others, key=self._decode_cost))

    def _local(self, decodes: list[Instance], best: _Choice) -> _Choice | None:
        """Prefill where it is decoded, if the prompt is short there, nobody notices, and it is no later for it."""
        in_time_s = best.ttft_s if self.request.ttft_slo_s is None else self._ttft_limit_s()
        short = [
            choice
            for choice in map(self._choice, decodes)
            if choice.instance.pool is not Pool.MIX
            and self._uncached(choice) <= self.rules.local_prefill_tokens
            and choice.ttft_s <= in_time_s
            and self._keeps_tpot(choice.instance)
        ]
        return min(short, key=self._first_tokens_s, default=None)

    def _spilled(self, best: _Choice, decodes: list[Instance]) -> _Choice:
        """A decoding instance instead of prefilling ones that take long, where it is sooner and its TPOT stays."""
        target_s = self.request.ttft_slo_s
        if target_s is None or best.ttft_s <= self.rules.spill_share * target_s:
            return best
        able = [choice for choice in map(self._choice, decodes) if self._has_slack(choice)]
        return min([best, *able], key=lambda choice: choice.ttft_s)

    def _whole(self, instances: list[Instance]) -> Placement | Refusal:
        """All of an offline request on one instance."""
        return self._placed(best := min(map(self._choice, instances), key=self._first_tokens_s), best.instance)

    def _placed(self, prefill: _Choice, decode: Instance) -> Placement | Refusal:
        limit_s = self.rules.max_wait_s * (OFFLINE_SHARE if self.request.is_offline else 1.0)
        limit_s = max(limit_s, self.request.ttft_slo_s or 0.0)
        wait_s = prefill.ttft_s
        if decode is not prefill.instance:
            wait_s = max(wait_s, predict.room_wait_s(decode, self.request.num_prompt_tokens))
        # An idle instance takes any request, however long it computes.
        is_idle = not (prefill.instance.load.num_running or prefill.instance.load.num_waiting)
        if wait_s > limit_s and not (self.request.is_begun or is_idle):
            whose = " for offline requests" if self.request.is_offline else ""
            return Refusal(
                reason=f"the first token would take {wait_s:.1f} s, the limit is {limit_s:.1f} s{whose}; retry later",
                retry_after_s=wait_s - limit_s,
            )
        spared = predict.tokens_spared(prefill.cached, self.request.num_prompt_tokens)
        return Placement(
            prefill=prefill.instance.name,
            decode=decode.name,
            ttft_s=prefill.ttft_s / prefill.instance.ttft_ratio,
            num_cached_tokens=spared,
            fetch=prefill.fetch,
        )

    def _nobody(self) -> Refusal:
        if not self.up:
            return Refusal(reason=f"none of {len(self.all)} instances takes work now; retry later", retry_after_s=1.0)
        length = self.request.num_prompt_tokens + self.request.max_output_tokens
        longest = max(one.info.max_model_len for one in self.up)
        most = max(one.info.kv_tokens_total for one in self.up)
        return Refusal(
            reason=f"{self.request.num_prompt_tokens} prompt tokens and {self.request.max_output_tokens} to generate: "
            f"{length} are more than any instance takes (max_model_len={longest}, {most} tokens in the KV cache); "
            "shorten the prompt or lower max_tokens"
        )

    def _choice(self, instance: Instance) -> _Choice:
        cached = self.cached.get(instance.name, _NOTHING)
        ttft_s = predict.ttft_s(instance, self.request, cached) * instance.ttft_ratio
        fetch = None if self.fetching is None else self.fetching.best(instance, cached)
        if fetch is None:
            return _Choice(instance, ttft_s, cached, None)
        return _Choice(instance, ttft_s - fetch.spared_s + fetch.copy_s, CachedTokens(device=fetch.num_tokens), fetch)

    def _first_tokens_s(self, choice: _Choice) -> float:
        """Until some tokens are there; where it only prefills, the first."""
        if not choice.instance.takes_decodes:
            return choice.ttft_s
        num_tokens = min(_FIRST_TOKENS, self.request.max_output_tokens)
        return choice.ttft_s + num_tokens * predict.interval_s(choice.instance, self.request.num_prompt_tokens)

    def _slo_key(self, choice: _Choice) -> tuple[bool, float]:
        """Those that keep all targets first."""
        is_late = choice.ttft_s > self._ttft_limit_s()
        misses = is_late or (choice.instance.takes_decodes and not self._keeps_tpot(choice.instance))
        return (misses, self._first_tokens_s(choice))

    def _decode_cost(self, instance: Instance) -> float:
        """Until some tokens are there, from the first one on."""
        num_prompt_tokens = self.request.num_prompt_tokens
        wait_s = predict.room_wait_s(instance, num_prompt_tokens) + predict.join_wait_s(instance)
        num_tokens = min(_FIRST_TOKENS, self.request.max_output_tokens)
        return wait_s + num_tokens * predict.interval_s(instance, num_prompt_tokens)

    def _uncached(self, choice: _Choice) -> int:
        return self.request.num_prompt_tokens - predict.tokens_spared(choice.cached, self.request.num_prompt_tokens)

    def _has_slack(self, choice: _Choice) -> bool:
        return choice.ttft_s <= self._ttft_limit_s() and self._keeps_tpot(choice.instance)

    def _keeps_tpot(self, instance: Instance) -> bool:
        """Whether there is room, and the tokens' interval stays within the target with this one more."""
        num_tokens, target_s = self.request.num_prompt_tokens, self.request.tpot_slo_s
        if predict.room_wait_s(instance, num_tokens) > 0:
            return False
        if target_s is None:
            return True
        return predict.interval_s(instance, num_tokens) <= self.rules.tpot_margin * target_s

    def _ttft_limit_s(self) -> float:
        target_s = self.request.ttft_slo_s
        return float("inf") if target_s is None else self.rules.ttft_margin * target_s


def _fits(instance: Instance, request: RequestShape) -> bool:
    length = request.num_prompt_tokens + request.max_output_tokens
    return length <= instance.info.max_model_len and request.num_prompt_tokens < instance.info.kv_tokens_total


def _waiting_share(instance: Instance) -> float:
    """Prompt tokens that wait, and what decodes there if it does both, over what the KV cache takes."""
    num_tokens = instance.load.num_waiting_tokens + (instance.load.kv_tokens_used if instance.takes_decodes else 0)
    return num_tokens / max(1, instance.info.kv_tokens_total)


def _kv_share(instance: Instance) -> float:
    return instance.load.kv_tokens_used / max(1, instance.info.kv_tokens_total)


def shortlist(
    pools: Mapping[Pool, Sequence[str]],
    cached: Mapping[str, CachedTokens],
    num_each: int,
    pick: Callable[[int], int],
) -> list[str]:
    """Some of very many instances to choose among: the longest prefixes, and some of each pool.

    num_each: of each kind. pick(n): a number below n, drawn. The better of two drawn is already nearly as good as the
    best of all (Mitzenmacher, The Power of Two Choices in Randomized Load Balancing, 2001).
    """
    names = dict.fromkeys(heapq.nlargest(num_each, cached, key=lambda name: cached[name].device))
    for members in pools.values():
        if len(members) <= num_each:
            names.update(dict.fromkeys(members))
        else:
            names.update(dict.fromkeys(members[pick(len(members))] for _ in range(num_each)))
    return list(names)
