"""Which instances prefill and which decode: as many decode as the targets need, the others prefill.

Roles are not properties of instances. One that changes first enters a pool in between, where it takes work of its new
kind only and finishes what it has of the old; nothing restarts and nothing is lost. So a change costs little, and what
has to be prevented is going back and forth.

    P -> D   decoding is short: live TPOT above its target, or more decodes needed than there are to keep predicted TPOT
             and KV within their limits; or prefill has been idle for a while and decoding gains by another one
    D -> P   prefill is short: live TTFT above its target, or what waits takes too much of it; and the decodes that
             remain keep their target with room to spare

Either takes back what is still changing in the other direction first, the lightest first. After a change the other
direction has to wait `dwell_s`, and what is taken for a change must be spare by a margin that the change itself cannot
use up: on a stationary load nothing moves. Two decodes are kept, one where there are fewer than four instances, and one
prefill. Only instances started for any role change theirs.

Source: xLLM 3.2, arXiv:2510.14686, and Arrow, arXiv:2505.11916.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from xllm_compile.runtime.policies.chunk import StepLoad
from xllm_compile.scheduler.cluster.state import Instance, Pool, Role
from xllm_compile.scheduler.policies import predict

_IN_BETWEEN = {Pool.PREFILL_TO_DECODE: Pool.DECODE, Pool.DECODE_TO_PREFILL: Pool.PREFILL}
_DECODES = (Pool.DECODE, Pool.PREFILL_TO_DECODE)


@dataclass(frozen=True, kw_only=True, slots=True)
class RoleRules:
    """What of role changes is chosen once."""

    ttft_slo_s: float
    """Of the service."""
    tpot_slo_s: float
    queue_share: float = 0.25
    """Share of the TTFT target that waiting prompts may take before prefill is short."""
    tpot_share: float = 0.9
    """Share of the TPOT target that predicted intervals may take before decoding is short."""
    spare_share: float = 0.7
    """Likewise after a decode was taken away: the distance between the two keeps it from coming straight back."""
    kv_share: float = 0.9
    """Share of the decodes' KV cache that may be taken."""
    dwell_s: float = 5.0
    """After a change, the other direction waits for so long."""
    idle_s: float = 10.0
    """Prefill that had nothing to do for so long gives an instance away."""

    def __post_init__(self) -> None:
        for name in ("ttft_slo_s", "tpot_slo_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if not 0 < self.spare_share < self.tpot_share <= 1:
            raise ValueError(
                f"spare_share={self.spare_share} must be above 0 and below tpot_share={self.tpot_share}, at most 1"
            )
        if self.dwell_s < 0 or self.idle_s < 0:
            raise ValueError(f"dwell_s={self.dwell_s} and idle_s={self.idle_s} must be at least 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Roles:
    """The decision, and what the next one has to know of it. Times are seconds of the caller's clock."""

    pools: dict[str, Pool] = field(default_factory=dict)
    """Wanted, of every instance up."""
    changed_s: float | None = None
    """When an instance last changed its direction, and which one."""
    to_prefill: bool = False
    busy_s: float | None = None
    """When prompts last waited anywhere."""


def decide(instances: Sequence[Instance], before: Roles, rules: RoleRules, now: float) -> Roles:
    """The pools that the instances should be in from now on.

    instances: those of one model, with their loads and present pools. before: the last decision, Roles() at first.
    """
    up = {one.name: one for one in instances if one.takes_work}
    pools = {name: _settled(one) for name, one in up.items()}
    for name, one in up.items():
        if one.pool is Pool.MIX:
            pools[name] = _joining(one.info.role, pools.values(), len(up))
    fleet = _Fleet(up, pools, rules)
    after = replace(before, pools=pools, busy_s=now if fleet.waiting_s > 0 or before.busy_s is None else before.busy_s)
    num_to_decode, num_to_prefill = fleet.decodes_short(), fleet.prefills_short()
    if num_to_decode == 0 and num_to_prefill == 0 and after.busy_s is not None and now - after.busy_s >= rules.idle_s:
        num_to_decode = fleet.idle_prefills()
    to_prefill = num_to_decode == 0
    count = num_to_prefill if to_prefill else num_to_decode
    if before.changed_s is not None and before.to_prefill is not to_prefill and now - before.changed_s < rules.dwell_s:
        return after
    movers = fleet.movers(to_prefill)[:count]
    if not movers:
        return after
    for one in movers:
        pools[one.name] = _turned(pools[one.name])
    return replace(after, changed_s=now, to_prefill=to_prefill, busy_s=now)


def least_decodes(num_instances: int) -> int:
    return 2 if num_instances >= 4 else 1


def _settled(instance: Instance) -> Pool:
    """The pool it is in, or the one it was changing to, once its old work is done."""
    load = instance.load
    if instance.pool is Pool.PREFILL_TO_DECODE:
        is_done = load.num_waiting_tokens == 0 and load.num_running <= load.num_decoding
    else:
        is_done = load.num_decoding == 0
    return _IN_BETWEEN[instance.pool] if is_done and instance.pool in _IN_BETWEEN else instance.pool


def _joining(role: Role, pools: Iterable[Pool], num_instances: int) -> Pool:
    """Of an instance that has no pool yet: the one it was started for, or what there is less of."""
    if role is not Role.MIX:
        return Pool.DECODE if role is Role.DECODE else Pool.PREFILL
    taken = list(pools)
    num_decodes = sum(pool in _DECODES for pool in taken)
    num_prefills = sum(pool is not Pool.MIX for pool in taken) - num_decodes
    is_short = num_decodes < least_decodes(num_instances) and num_prefills >= 1
    return Pool.DECODE if is_short or num_decodes < num_prefills else Pool.PREFILL


def _turned(pool: Pool) -> Pool:
    """Changing to the other side; one that had not yet finished changing goes back to where it came from."""
    return {
        Pool.PREFILL: Pool.PREFILL_TO_DECODE,
        Pool.DECODE_TO_PREFILL: Pool.PREFILL_TO_DECODE,
        Pool.DECODE: Pool.DECODE_TO_PREFILL,
        Pool.PREFILL_TO_DECODE: Pool.DECODE_TO_PREFILL,
    }[pool]


class _Fleet:
    """What the instances together have to do, and who could do something else."""

    def __init__(self, up: dict[str, Instance], pools: dict[str, Pool], rules: RoleRules) -> None:
        self.rules = rules
        self.decodes = [one for name, one in up.items() if pools[name] in _DECODES]
        self.prefills = [one for name, one in up.items() if pools[name] not in _DECODES]
        self.changing = {name for name, pool in pools.items() if pool in _IN_BETWEEN}
        self.num_instances = len(up)
        self.num_seqs = sum(predict.decode_load(one).num_seqs for one in up.values())
        self.num_context = sum(predict.decode_load(one).num_keys for one in up.values())
        self.waiting_s = sum(_waiting_s(one, rules.tpot_slo_s) for one in up.values())
        """Seconds of one instance."""

    def decodes_short(self) -> int:
        """Decodes that are missing."""
        spare = len(self.prefills) - 1
        if spare <= 0:
            return 0
        missing = self._decodes_needed(self.rules.tpot_share) - len(self.decodes)
        tpots = [one.load.tpot_s for one in self.decodes if one.load.tpot_s is not None]
        if missing <= 0 and tpots and sum(tpots) / len(tpots) > self.rules.tpot_slo_s:
            missing = 1
        return min(spare, max(0, missing))

    def prefills_short(self) -> int:
        """Prefills that are missing and can be had from the decodes."""
        needed = max(self._decodes_needed(self.rules.spare_share), least_decodes(self.num_instances))
        spare = len(self.decodes) - needed
        if spare <= 0:
            return 0
        limit_s = self.rules.queue_share * self.rules.ttft_slo_s
        missing = int(self.waiting_s / limit_s) + 1 - len(self.prefills) if self.waiting_s > limit_s else 0
        ttfts = [one.load.ttft_s for one in self.prefills if one.load.ttft_s is not None]
        # What is over already and what can be done about it are two things: only a queue can be shared.
        if missing <= 0 and self.waiting_s > 0 and ttfts and sum(ttfts) / len(ttfts) > self.rules.ttft_slo_s:
            missing = 1
        return min(spare, max(0, missing))

    def idle_prefills(self) -> int:
        """Whether another decode would shorten intervals that are half of what they may be, or longer."""
        if len(self.prefills) <= 1 or not self.decodes:
            return 0
        return int(self._interval_s(len(self.decodes)) > 0.5 * self.rules.tpot_slo_s)

    def movers(self, to_prefill: bool) -> list[Instance]:
        """Who may change, in this order: those that were changing the other way, the lightest first."""
        side = self.decodes if to_prefill else self.prefills
        return sorted(
            (one for one in side if one.info.role is Role.MIX),
            key=lambda one: (one.name not in self.changing, _weight_s(one, to_prefill, self.rules.tpot_slo_s)),
        )

    def _decodes_needed(self, share: float) -> int:
        """Fewest instances that decode all there is, within so much of the target and of the KV cache."""
        everyone = len(self.decodes) + len(self.prefills)
        for count in range(least_decodes(self.num_instances), everyone):
            if self._interval_s(count) <= share * self.rules.tpot_slo_s and self._holds(count, share):
                return count
        return everyone

    def _interval_s(self, num_decodes: int) -> float:
        """Between tokens, of all that decodes dealt to so many instances, predicted by the slowest."""
        num_seqs, num_keys = -(-self.num_seqs // num_decodes), -(-self.num_context // num_decodes)
        load = StepLoad(num_seqs, num_seqs, num_keys)
        sides = (*self.decodes, *self.prefills)
        return max(predict.profile_of(one).step_s(load) for one in sides)

    def _holds(self, num_decodes: int, share: float) -> bool:
        """Whether so many have the KV cache and the seats for all that decodes."""
        sides = (*self.decodes, *self.prefills)
        kv_tokens = min(one.info.kv_tokens_total for one in sides)
        seats = min(one.info.max_num_seqs for one in sides)
        limit = self.rules.kv_share * share / self.rules.tpot_share
        return self.num_context <= num_decodes * kv_tokens * limit and self.num_seqs <= num_decodes * seats


def _waiting_s(instance: Instance, tpot_slo_s: float) -> float:
    num_tokens = instance.load.num_waiting_tokens - instance.load.num_offline_waiting_tokens
    return predict.prefill_s(instance, num_tokens, num_tokens**2 // (2 * max(1, instance.load.num_waiting)), tpot_slo_s)


def _weight_s(instance: Instance, to_prefill: bool, tpot_slo_s: float) -> float:
    """Of the work that it would have to finish beside the new."""
    return float(instance.load.num_context_tokens) if to_prefill else _waiting_s(instance, tpot_slo_s)
