"""Offline work in the gaps of online work: how much of it, where, and who takes it over from whom.

Instances that prefill are **latency-relaxed**: a step may take long. Those that decode are **latency-strict**: each
step is somebody's TPOT. Offline requests begin in the relaxed pool, as a whole (`routing.py`); there they

- prefill only while no online prompt waits, in chunks short enough that one that comes is not held up for long
- decode only while no online prompt waits, at most as many as still gain by it (`saturation_seqs`)
- hold at most a share of the KV cache, so that online prompts find room without anybody losing what was computed.

A strict instance with slack pulls offline sequences over: as many as keep its step, as predicted, within 0.98 of the
tightest TPOT target (`offline_seqs`), those first whose length uses up its KV cache and its steps together. When online
sequences come, the offline ones that came last are left out of steps until there is slack again; they keep their KV
unless that is wanted too.

Source: OOCO, arXiv:2511.21862; xLLM 3.1, arXiv:2510.14686. Two of its choices are made otherwise here: sequences that
have to give way wait instead of being computed again, and a chunk is where prefill is interrupted instead of a layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xllm_compile.runtime.policies.chunk import StepLoad
from xllm_compile.scheduler.cluster.state import Health, Instance, Pool, StepProfile
from xllm_compile.scheduler.policies import predict


@dataclass(frozen=True, kw_only=True, slots=True)
class ColocationRules:
    """What of co-location is chosen once."""

    tpot_slo_s: float
    """The tightest of online requests."""
    tpot_share: float = 0.98
    """Share of it that a step with offline sequences may take."""
    pull_share: float = 0.9
    """A strict instance pulls while its step takes less of the target than this, and its sequences less of the KV."""
    relaxed_kv_share: float = 0.7
    """Share of a relaxed instance's KV cache that offline sequences may hold."""
    interrupt_s: float = 0.1
    """An online prompt waits for an offline chunk so long at most."""
    saturation: float = 0.8
    """A batch is large enough when so much of a step grows with its sequences."""

    def __post_init__(self) -> None:
        for name in ("tpot_slo_s", "interrupt_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name in ("tpot_share", "pull_share", "relaxed_kv_share", "saturation"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be between 0 and 1")


def offline_seqs(profile: StepProfile, online: StepLoad, context: int, rules: ColocationRules, most: int) -> int:
    """Sequences of so many KV tokens, ``most`` at most, that can ride with the online ones within their target."""
    limit_s = rules.tpot_share * rules.tpot_slo_s

    def fits(count: int) -> bool:
        load = StepLoad(online.num_tokens + count, online.num_seqs + count, online.num_keys + count * (context + 1))
        return profile.step_s(load) <= limit_s

    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def saturation_seqs(profile: StepProfile, context: int, rules: ColocationRules, most: int) -> int:
    """The batch beyond which more sequences of so many KV tokens hardly raise tokens per second; at least 1.

    Up to there a step takes about as long whatever its batch, since it reads the weights in any case.
    """
    one_s = profile.step_s(StepLoad(1, 1, context + 1))

    def is_saturated(count: int) -> bool:
        all_s = profile.step_s(StepLoad(count, count, count * (context + 1)))
        return all_s - one_s >= rules.saturation * all_s

    low, high = 1, max(1, most)
    while low < high:
        middle = (low + high) // 2
        if is_saturated(middle):
            high = middle
        else:
            low = middle + 1
    return low


def offline_chunk_tokens(profile: StepProfile, decodes: StepLoad, rules: ColocationRules) -> int:
    """Tokens of a step that prefills offline requests beside the decodes; at least one more than those."""
    return max(decodes.num_tokens + 1, profile.tokens_within(rules.interrupt_s, decodes))


@dataclass(frozen=True, kw_only=True, slots=True)
class Pull:
    """What a strict instance could take over."""

    num_seqs: int
    num_tokens: int
    """Of KV, of all of them together."""

    @property
    def preferred_tokens(self) -> int:
        """Length of sequences that use up both together."""
        return self.num_tokens // max(1, self.num_seqs)


def pull_of(instance: Instance, rules: ColocationRules) -> Pull | None:
    """What a strict instance asks the relaxed ones for; None without slack."""
    load, info, profile = instance.load, instance.info, predict.profile_of(instance)
    if not instance.takes_work or load.num_waiting_tokens:
        return None
    target_s = rules.pull_share * rules.tpot_slo_s
    decodes = StepLoad(load.num_decoding, load.num_decoding, load.num_context_tokens)
    kv_tokens = int(rules.pull_share * info.kv_tokens_total) - load.kv_tokens_used
    seats = info.max_num_seqs - load.num_running - load.num_waiting
    slack_s = target_s - profile.step_s(decodes) * instance.tpot_ratio
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


def pick(pull: Pull, lengths: Mapping[str, int]) -> list[str]:
    """Which offline sequences a relaxed instance hands over, of those it decodes: those of the length that fits best.

    lengths: KV tokens by sequence. Neither more sequences nor more tokens than were asked for.
    """
    taken: list[str] = []
    tokens_left = pull.num_tokens
    by_fit = sorted(lengths, key=lambda one: (abs(lengths[one] - pull.preferred_tokens), one))
    for name in by_fit:
        if len(taken) == pull.num_seqs:
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
        pull = pull_of(target, rules) if target.takes_decodes else None
        if pull is None:
            continue
        sources = [
            one for one in instances if one is not target and left.get(one.name) and _gives_to(one, target, rules)
        ]
        source = max(sources, key=lambda one: len(left[one.name]), default=None)
        if source is not None:
            for name in pick(pull, left[source.name]):
                del left[source.name][name]
                moves.append((name, target.name))
    return moves


def _gives_to(source: Instance, target: Instance, rules: ColocationRules) -> bool:
    """Whether offline sequences of one are better off on the other: it prefills for others, or has no slack itself."""
    mine, theirs = source.info, target.info
    if source.health is Health.SUSPECT or not (mine.transfers and theirs.transfers):
        return False
    if (mine.weights_key, mine.kv_layout) != (theirs.weights_key, theirs.kv_layout):
        return False
    if source.pool in (Pool.PREFILL, Pool.DECODE_TO_PREFILL):
        return True
    load = source.load
    num_online_waiting_tokens = load.num_waiting_tokens - load.num_offline_waiting_tokens
    is_late = predict.interval_s(source, num_more=0) > rules.pull_share * rules.tpot_slo_s
    return is_late or num_online_waiting_tokens > mine.max_num_batched_tokens
