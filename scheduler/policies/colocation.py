"""Offline work in the gaps of online work: which instance takes it over from which.

What a step takes of offline work is decided where it is planned (`runtime/policies/offline.py`): as much as keeps the
TPOT of the online sequences in it, who are given shorter steps where they are late, and little where online prompts
are computed. So any instance can have offline requests, as a whole. They begin where their prompts are computed soonest
(`routing.py`), and their decoding moves, with its KV, to instances with slack: from those where prompts wait, from
those whose steps are too long for all they have, and else until both have as many.

Source: OOCO, arXiv:2511.21862; xLLM 3.1, arXiv:2510.14686. There instances that prefill (latency-relaxed) have offline
requests pulled from them by those that decode (latency-strict). Here either kind pulls, and either computes prompts:
steps of prompts and decodes together are the cheapest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xllm_compile.runtime.policies.chunk import StepLoad
from xllm_compile.scheduler.cluster.state import Health, Instance
from xllm_compile.scheduler.policies import predict


@dataclass(frozen=True, kw_only=True, slots=True)
class ColocationRules:
    """What of co-location is chosen once."""

    tpot_slo_s: float
    """The tightest of online requests."""
    pull_share: float = 0.9
    """An instance pulls while its step takes less of the target than this, and its sequences less of the KV."""
    period_s: float = 0.5
    """Between two times that instances are asked,"""
    max_pulls: int = 4
    """and how many sequences each pulls then: for each its device is at rest for a moment."""

    def __post_init__(self) -> None:
        for name in ("tpot_slo_s", "period_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if not 0 < self.pull_share < 1:
            raise ValueError(f"pull_share={self.pull_share} must be between 0 and 1")
        if self.max_pulls < 1:
            raise ValueError(f"max_pulls={self.max_pulls} must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pull:
    """What an instance with slack could take over."""

    num_seqs: int
    num_tokens: int
    """Of KV, of all of them together."""

    @property
    def preferred_tokens(self) -> int:
        """Length of sequences that use up both together."""
        return self.num_tokens // max(1, self.num_seqs)


def pull_of(instance: Instance, rules: ColocationRules) -> Pull | None:
    """What it could take over; None without slack."""
    load, info, profile = instance.load, instance.info, predict.profile_of(instance)
    if not instance.takes_work or load.num_waiting_tokens:
        return None
    decodes = _decodes(instance)
    kv_tokens = int(rules.pull_share * info.kv_tokens_total) - load.kv_tokens_used
    seats = info.max_num_seqs - load.num_running - load.num_waiting
    slack_s = _slack_s(instance, rules)
    if kv_tokens <= 0 or seats <= 0 or slack_s <= 0:
        return None
    # Each one costs its keys and a token of the step; steps of twice the tokens tell what a token costs.
    token_s = (profile.step_s(decodes._replace(num_tokens=2 * decodes.num_tokens + 64)) - profile.step_s(decodes)) / (
        decodes.num_tokens + 64
    )
    by_time = int(slack_s / (profile.key_s * kv_tokens / seats + profile.sequence_s + token_s))
    num_seqs = min(seats, by_time)
    if num_seqs <= 0:
        return None
    return Pull(num_seqs=num_seqs, num_tokens=min(kv_tokens, kv_tokens * num_seqs // seats + 1))


def pick(pull: Pull, lengths: Mapping[str, int], most: int) -> list[str]:
    """Which offline sequences an instance hands over, of those it decodes: those of the length that fits best.

    lengths: KV tokens by sequence. Neither more sequences nor more tokens than were asked for, and ``most`` at most.
    """
    taken: list[str] = []
    tokens_left = pull.num_tokens
    by_fit = sorted(lengths, key=lambda one: (abs(lengths[one] - pull.preferred_tokens), one))
    for name in by_fit:
        if len(taken) >= min(pull.num_seqs, most):
            break
        if lengths[name] <= tokens_left:
            taken.append(name)
            tokens_left -= lengths[name]
    return taken


def pulls(
    instances: Sequence[Instance], offline: Mapping[str, Mapping[str, int]], rules: ColocationRules
) -> list[tuple[str, str]]:
    """Offline sequences that go on elsewhere, each with the name of the instance that takes it over.

    offline: KV tokens by sequence, by the name of the instance where it decodes. KV that cannot be moved stays where it
    is: to compute it again would take the slack that it is to use.
    """
    left = {name: dict(lengths) for name, lengths in offline.items()}
    moves: list[tuple[str, str]] = []
    for target in instances:
        pull = pull_of(target, rules)
        if pull is None:
            continue
        offered = {
            one.name: _offered(one, len(left[one.name]), target, rules)
            for one in instances
            if left.get(one.name) and _can_move(one, target)
        }
        source = max(offered, key=lambda name: offered[name], default=None)
        if source is not None:
            for name in pick(pull, left[source], min(rules.max_pulls, offered[source])):
                del left[source][name]
                moves.append((name, target.name))
    return moves


def _offered(source: Instance, num_offline: int, target: Instance, rules: ColocationRules) -> int:
    """Sequences, of so many offline ones of the caller's, that would be better off on the other.

    All where prompts of more than a step wait or steps are too long, else as many as leave both with the same; the odd
    one goes from who prefills to who decodes.
    """
    load = source.load
    if load.num_waiting_tokens > source.info.max_num_batched_tokens or _slack_s(source, rules) < 0:
        return num_offline
    # The caller may know of some that are younger than the report.
    difference = max(num_offline, load.num_decoding) - target.load.num_decoding
    takes_odd = target.takes_decodes and not source.takes_decodes
    half = max(0, (difference + takes_odd) // 2)
    # The others are moved by other gateways, which see the same: all together move half.
    return min(num_offline, half * num_offline // max(num_offline, load.num_offline_decoding))


def _can_move(source: Instance, target: Instance) -> bool:
    mine, theirs = source.info, target.info
    if source is target or source.health is Health.SUSPECT or not (mine.transfers and theirs.transfers):
        return False
    return mine.has_kv_like(theirs)


def _decodes(instance: Instance) -> StepLoad:
    """A step of all that decodes there, offline ones that are held back as well."""
    load = instance.load
    return StepLoad(load.num_decoding, load.num_decoding, load.num_context_tokens)


def _slack_s(instance: Instance, rules: ColocationRules) -> float:
    """What such a step leaves of the target's share; below 0 where it is too long."""
    step_s = predict.profile_of(instance).step_s(_decodes(instance))
    return rules.pull_share * rules.tpot_slo_s - step_s
