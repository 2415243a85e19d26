"""What the service knows of its instances: plain data that messages carry and policies decide on."""

import bisect
from dataclasses import dataclass
from enum import StrEnum

from xllm_compile.runtime.policies.chunk import StepLoad


class Role(StrEnum):
    """What an instance was started for. MIX takes any work; which it has now is its pool."""

    MIX = "mix"
    PREFILL = "prefill"
    DECODE = "decode"
    ENCODE = "encode"
    """For models that read images, which there are none of yet: nothing starts one, and it gets no work."""


class Pool(StrEnum):
    """What an instance does now. The two in between finish the work of the old pool and take that of the new one."""

    MIX = "mix"
    """It decodes what it prefills."""
    PREFILL = "prefill"
    DECODE = "decode"
    PREFILL_TO_DECODE = "prefill_to_decode"
    DECODE_TO_PREFILL = "decode_to_prefill"


class Health(StrEnum):
    """ACTIVE and LEASE_LOST instances get work, SUSPECT ones none."""

    ACTIVE = "active"
    LEASE_LOST = "lease_lost"
    """Gone from the registry, but it answers."""
    SUSPECT = "suspect"
    """It does not answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InstanceInfo:
    """What an instance registers. Does not change while its process lives."""

    name: str
    """Unique among the instances that are up; a restarted one may have it again."""
    incarnation: str
    """Of this start of the process: what an earlier start of the same name sent is stale."""
    role: Role
    address: str
    """HOST:PORT of its gRPC server."""
    transfers: tuple[str, ...] = ()
    """Where KV can be sent to it, the fastest way first: addresses of runtime/transfer."""
    host: str = ""
    """Names the machine: shared memory works between instances of one."""
    model_names: tuple[str, ...] = ()
    weights_key: str = ""
    """Names what KV is computed with,"""
    kv_layout: str = ""
    """and how its bytes lie; see `has_kv_like`."""
    kv_bytes_per_token: int = 0
    """0 says nothing."""
    block_tokens: int = 16
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_tokens_total: int
    version: str = ""

    def has_kv_like(self, other: "InstanceInfo") -> bool:
        """Whether KV can move between the two: computed with the same weights, its bytes in the same places."""
        return (self.weights_key, self.kv_layout) == (other.weights_key, other.kv_layout)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepProfile:
    """Predicted seconds of a step, as the instance believes at the moment."""

    num_tokens: tuple[int, ...]
    """Growing sizes of a step,"""
    seconds: tuple[float, ...]
    """and what each takes without what attention reads; between them it is linear."""
    sequence_s: float
    key_s: float
    """To read one key with its value."""
    pair_s: float
    """To compute one (query, key) pair."""

    def step_s(self, load: StepLoad) -> float:
        linear = self.sequence_s * load.num_seqs + self.key_s * load.num_keys + self.pair_s * load.num_pairs
        return self._by_tokens(max(1, load.num_tokens)) + linear

    def tokens_within(self, seconds: float, load: StepLoad) -> int:
        """Tokens that a step of that load can have in all, to take so long at most; 0 where even one takes longer."""
        seconds -= self.sequence_s * load.num_seqs + self.key_s * load.num_keys + self.pair_s * load.num_pairs
        if seconds < self.seconds[0]:
            return 0
        # The last size that is in time; the line from there to the next one says how much further it goes.
        at = max(1, bisect.bisect_right(self.seconds, seconds)) - 1
        if len(self.num_tokens) == 1:
            return self.num_tokens[0]
        low = min(at, len(self.num_tokens) - 2)
        rise_s = self.seconds[low + 1] - self.seconds[low]
        if rise_s <= 0:
            return self.num_tokens[at]
        step = (self.num_tokens[low + 1] - self.num_tokens[low]) / rise_s
        return int(self.num_tokens[low] + (seconds - self.seconds[low]) * step)

    def _by_tokens(self, num_tokens: int) -> float:
        sizes, seconds = self.num_tokens, self.seconds
        if num_tokens <= sizes[0] or len(sizes) == 1:
            return seconds[0]
        # Beyond the last size the last slope goes on.
        at = min(bisect.bisect_left(sizes, num_tokens), len(sizes) - 1)
        slope = (seconds[at] - seconds[at - 1]) / (sizes[at] - sizes[at - 1])
        return seconds[at - 1] + slope * (num_tokens - sizes[at - 1])


@dataclass(frozen=True, kw_only=True, slots=True)
class InstanceCounters:
    """What an instance has done since its start, for people to look at; no policy reads it. Numbers only grow."""

    num_prompt_tokens: int = 0
    """Computed."""
    num_generated_tokens: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    """Of those looked up, found in the prefix cache."""
    num_exact_steps: int = 0
    """Steps by how the graphs of their layers were found; likewise below."""
    num_padded_steps: int = 0
    num_dynamic_steps: int = 0
    num_eager_steps: int = 0
    num_preemptions: int = 0
    num_hand_overs: int = 0
    """Sequences whose KV went to other instances."""
    num_failed_hand_overs: int = 0
    num_sent_bytes: int = 0
    """KV that arrived there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InstanceLoad:
    """What an instance reports a few times a second."""

    num_running: int = 0
    """Sequences in steps, of any kind."""
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    """Prompt tokens that wait, and those left of prompts that are being computed."""
    num_late_waiting_tokens: int = 0
    """Of these, those of online prompts that wait behind all that can be in time (runtime/policies/order.py)."""
    num_decoding: int = 0
    """Sequences of num_running behind their first token."""
    num_context_tokens: int = 0
    """KV tokens of those."""
    num_offline: int = 0
    """Sequences, running and waiting, that are best effort. They give way to the others, which count without them:"""
    num_offline_waiting_tokens: int = 0
    """of num_waiting_tokens,"""
    num_offline_decoding: int = 0
    """of num_decoding,"""
    num_offline_context_tokens: int = 0
    """and of num_context_tokens and kv_tokens_used."""
    kv_tokens_used: int = 0
    """Of live sequences and of reservations; cached prefixes give way."""
    ttft_s: float | None = None
    """Mean of the last seconds; None where there was none. Likewise tpot_s."""
    tpot_s: float | None = None
    is_draining: bool = False
    profile: StepProfile | None = None
    """None as long as nothing is known."""
    counters: InstanceCounters = InstanceCounters()


@dataclass(frozen=True, kw_only=True, slots=True)
class Instance:
    """One instance as the service sees it."""

    info: InstanceInfo
    health: Health = Health.ACTIVE
    pool: Pool
    load: InstanceLoad = InstanceLoad()
    load_age_s: float = 0.0
    """Since the load was reported. What was sent there since then is added to `load` by whoever routes."""
    ttft_ratio: float = 1.0
    """What happened over what was predicted, lately (scheduler/policies/correction.py). Steps need none:
    instances correct their own profiles by those that they measured."""

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def takes_work(self) -> bool:
        return self.health is not Health.SUSPECT and not self.load.is_draining and self.info.role is not Role.ENCODE

    @property
    def takes_prefills(self) -> bool:
        return self.takes_work and self.pool in (Pool.MIX, Pool.PREFILL, Pool.DECODE_TO_PREFILL)

    @property
    def takes_decodes(self) -> bool:
        return self.takes_work and self.pool in (Pool.MIX, Pool.DECODE, Pool.PREFILL_TO_DECODE)


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestShape:
    """What routing knows of a request."""

    num_prompt_tokens: int
    """With what an interrupted request had generated already."""
    max_output_tokens: int
    digests: tuple[bytes, ...] = ()
    """Of the prompt's whole KV blocks (runtime/memory/prefix_cache.py)."""
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    is_offline: bool = False
    priority: int = 0
    is_begun: bool = False
    """An instance had it, and it has to go on elsewhere: it is past being refused for a queue."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetch:
    """KV of a prompt's beginning that another instance sends before the prompt is computed."""

    source: str
    num_tokens: int
    """From the prompt's start, that are there afterwards."""
    copy_s: float
    """Predicted, as the next."""
    spared_s: float
    """That computing them would take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where a request goes. The same instance twice: it is not handed over."""

    prefill: str
    decode: str
    ttft_s: float = 0.0
    """Predicted, without the correction that the instance's ttft_ratio is."""
    num_cached_tokens: int = 0
    """Of the prompt, that were counted on where it is prefilled, what is fetched included."""
    fetch: Fetch | None = None
    """To where it is prefilled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """Nobody can take a request."""

    reason: str
    """What, the value and the limit."""
    retry_after_s: float | None = None
    """When, as predicted, somebody can; None where waiting changes nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedTokens:
    """Tokens from a prompt's start that an instance has KV of, by where they are."""

    device: int = 0
    host: int = 0
    """Behind those on the device."""
    disk: int = 0
    """Behind those."""
