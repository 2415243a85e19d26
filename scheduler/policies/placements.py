"""What was sent to instances that their last reports do not know of yet.

An instance reports its load a few times a second. A burst would all go to the one that was idle in the last report,
were the requests placed since then not added to it. Counts are exact once reports include them, and forget nothing:
a request is taken out when it ends, or when the instance is gone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from xllm_compile.scheduler.cluster.state import Instance, Placement, RequestShape

# From a request's placement until it counts in the instance's own report: a message, and a step's planning.
_UNDER_WAY_S = 0.05


@dataclass(kw_only=True, slots=True)
class _Placed:
    request: RequestShape
    placement: Placement
    placed_s: float
    first_token_s: float | None = None


@dataclass(slots=True)
class Placements:
    """Times are seconds of one clock, the caller's."""

    _placed: dict[str, _Placed] = field(default_factory=dict)
    """By request."""
    _at: dict[str, dict[str, None]] = field(default_factory=dict)
    """Requests by instance whose reports may not know of them."""

    def place(self, request_id: str, request: RequestShape, placement: Placement, now: float) -> None:
        """Again for a request that is placed anew, elsewhere."""
        self.finished(request_id)
        self._placed[request_id] = _Placed(request=request, placement=placement, placed_s=now)
        for name in {placement.prefill, placement.decode}:
            self._at.setdefault(name, {})[request_id] = None

    def first_token(self, request_id: str, now: float) -> None:
        """Its prompt is computed: from here on it decodes."""
        if request_id in self._placed:
            self._placed[request_id].first_token_s = now

    def finished(self, request_id: str) -> None:
        """It ended, in whatever way, or is no longer this gateway's."""
        placed = self._placed.pop(request_id, None)
        if placed is not None:
            for name in {placed.placement.prefill, placed.placement.decode}:
                self._forget(name, request_id)

    def gone(self, name: str) -> None:
        """The instance, or an earlier start of it. Its requests are placed anew, or finished, by whoever lost them."""
        self._at.pop(name, None)

    def added(self, instances: Sequence[Instance], now: float) -> list[Instance]:
        """The instances, their loads with what was placed there since they were reported."""
        return [self._added(instance, now) if instance.name in self._at else instance for instance in instances]

    def _added(self, instance: Instance, now: float) -> Instance:
        load, reported_s = instance.load, now - instance.load_age_s - _UNDER_WAY_S
        num_waiting = num_waiting_tokens = num_decoding = num_context_tokens = kv_tokens = 0
        num_offline = num_offline_waiting_tokens = num_offline_decoding = num_offline_context_tokens = 0
        for request_id in list(self._at[instance.name]):
            placed = self._placed[request_id]
            prompt, is_offline = placed.request.num_prompt_tokens, placed.request.is_offline
            arrived = placed.placed_s <= reported_s
            decodes = placed.first_token_s is not None and placed.first_token_s <= reported_s
            if decodes or (arrived and placed.placement.decode != instance.name):
                self._forget(instance.name, request_id)
                continue
            if not arrived:
                kv_tokens += prompt
                num_offline += is_offline
                if placed.placement.prefill == instance.name and placed.first_token_s is None:
                    num_waiting += 1
                    num_waiting_tokens += prompt - placed.placement.num_cached_tokens
                    num_offline_waiting_tokens += is_offline * (prompt - placed.placement.num_cached_tokens)
            if placed.placement.decode == instance.name:
                num_decoding += 1
                num_context_tokens += prompt
                num_offline_decoding += is_offline
                num_offline_context_tokens += is_offline * prompt
        if not num_decoding and not num_waiting and not kv_tokens:
            return instance
        return replace(
            instance,
            load=replace(
                load,
                num_waiting=load.num_waiting + num_waiting,
                num_waiting_tokens=load.num_waiting_tokens + num_waiting_tokens,
                num_decoding=load.num_decoding + num_decoding,
                num_context_tokens=load.num_context_tokens + num_context_tokens,
                num_offline=load.num_offline + num_offline,
                num_offline_waiting_tokens=load.num_offline_waiting_tokens + num_offline_waiting_tokens,
                num_offline_decoding=load.num_offline_decoding + num_offline_decoding,
                num_offline_context_tokens=load.num_offline_context_tokens + num_offline_context_tokens,
                kv_tokens_used=load.kv_tokens_used + kv_tokens,
            ),
        )

    def _forget(self, name: str, request_id: str) -> None:
        at = self._at.get(name)
        if at is not None:
            at.pop(request_id, None)
            if not at:
                del self._at[name]
