"""What a request gives back. Names follow vLLM's RequestOutput."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from xllm_compile.runtime.memory.kv_tiers import TierStats

FinishReason = Literal["stop", "length", "abort", "handed_over"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Logprob:
    """Natural-log probability of one token, its rank (1 is the most probable) and its text."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(kw_only=True, slots=True)
class CompletionOutput:
    """One completion of a request; with RequestOutputKind.DELTA only what is new since the last one."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended it; None for end-of-sequence and length."""

    def join(self, new: "CompletionOutput") -> None:
        """Add what is new of the completion to what there is of it."""
        self.text += new.text
        self.token_ids = self.token_ids + new.token_ids
        if new.logprobs is not None:
            self.logprobs = (self.logprobs or []) + new.logprobs
        self.cumulative_logprob = new.cumulative_logprob
        self.finish_reason = new.finish_reason
        self.stop_reason = new.stop_reason


def hold(held: dict[int, CompletionOutput], new: CompletionOutput) -> None:
    """Add what is new of a completion to what is held of it, by its index. What is held belongs to the holder."""
    if new.index in held:
        held[new.index].join(new)
    else:
        held[new.index] = new


@dataclass(frozen=True, kw_only=True, slots=True)
class KVSent:
    """KV of one request that went to another instance, first to last byte; monotonic clock."""

    begin_s: float
    end_s: float
    num_bytes: int


@dataclass(kw_only=True, slots=True)
class RequestMetrics:
    """Of one request: times on the monotonic clock in seconds, None until it happened, and counts."""

    arrival_s: float
    ttft_slo_s: float | None = None
    """Wanted time to the first token, and between tokens: the request's, or else the server's."""
    tpot_slo_s: float | None = None
    scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    is_resumed: bool = False
    """The request's first token came from another instance: first_token_s is that of the first one from here."""
    num_preemptions: int = 0
    graph_steps: Counter[str] = field(default_factory=Counter)
    """Steps that the request was part of, by how the graphs of their layers were found (graph_cache.Outcome)."""
    num_draft_tokens: int = 0
    """Tokens guessed by speculative decoding,"""
    num_accepted_tokens: int = 0
    """and how many of them became part of the output."""
    num_forced_tokens: int = 0
    """Output tokens that a structured output forced, and that had no step of their own."""
    kv_sent: KVSent | None = None
    """Of one that was handed over."""


@dataclass(kw_only=True, slots=True)
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    embedding: npt.NDArray[np.float32] | None = None
    """Of a finished request that asked for one; its outputs are one without tokens."""
    num_cached_tokens: int = 0
    num_kv_tokens: int | None = None
    """Of a request that was handed over: tokens from its start whose KV the receiver has."""

    def join(self, new: "RequestOutput") -> None:
        """Add the request's next output, where both have only what is new."""
        held = {output.index: output for output in self.outputs}
        for output in new.outputs:
            hold(held, output)
        self.outputs = list(held.values())
        if new.prompt_logprobs is not None:
            self.prompt_logprobs = new.prompt_logprobs
        self.finished = new.finished
        self.embedding = new.embedding
        self.num_cached_tokens = new.num_cached_tokens
        self.num_kv_tokens = new.num_kv_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphCacheStats:
    """How steps found their graphs. Counters only grow."""

    choices: dict[tuple[str, str, str], int] = field(default_factory=dict)
    """Steps by (part, outcome, reason): part is layers, head or pool, the others are runtime.graph_cache's."""
    promotions: dict[str, int] = field(default_factory=dict)
    """What became of graphs for hot sizes: compiled, loaded, failed, evicted, no_compiler."""
    promoted_bytes: int = 0
    """Size of the promoted graphs in use."""

    def by_outcome(self) -> dict[str, int]:
        """Steps by how the graphs of their layers were found: exact, padded, dynamic, eager."""
        found = dict.fromkeys(("exact", "padded", "dynamic", "eager"), 0)
        for (part, outcome, _), count in self.choices.items():
            if part == "layers":
                found[outcome] += count
        return found


@dataclass(kw_only=True, slots=True)
class SpeculationStats:
    """How drafts fared. Counters only grow."""

    num_drafts: int = 0
    drafted_by_position: list[int] = field(default_factory=list)
    """Drafts that had a first, second, ... token."""
    accepted_by_position: list[int] = field(default_factory=list)
    """Of those the ones where it became part of the output."""
    draft_length: float = 0.0
    """Mean over the last drafts, in tokens."""

    @property
    def num_draft_tokens(self) -> int:
        return sum(self.drafted_by_position)

    @property
    def num_accepted_tokens(self) -> int:
        return sum(self.accepted_by_position)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReservationStats:
    """Counters only grow."""

    num_open: int = 0
    """Held now, those included that are being given up."""
    num_claimed: int = 0
    num_released: int = 0
    num_expired: int = 0
    """Nobody came for them in time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HandOverStats:
    """Counters only grow."""

    num_open: int = 0
    """Sequences whose slot waits for the sender."""
    num_complete: int = 0
    num_failed: int = 0
    """Not all of the KV arrived."""
    num_prefixes: int = 0
    """Cached prefixes that others asked for, and that arrived there;"""
    num_failed_prefixes: int = 0
    """those that did not."""
    num_bytes: int = 0
    """Bytes that arrived, of both."""


@dataclass(kw_only=True, slots=True)
class EngineStats:
    """A snapshot for /metrics, --stats and the benchmarks. Counters only grow."""

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    """Prompt tokens of those, and what is left of prompts that are being computed."""
    num_late_waiting_tokens: int = 0
    """Of these, those of online prompts that wait behind all that can be in time."""
    num_decoding: int = 0
    """Sequences of num_running behind their first token,"""
    num_context_tokens: int = 0
    """and their KV tokens."""
    kv_tokens_used: int = 0
    kv_tokens_total: int = 0
    kv_pages: dict[str, int] = field(default_factory=dict)
    """Physical pages that are free, allocated, mapped and reusable."""
    prefix_queried_tokens: int = 0
    """Tokens of sequences that were looked up in the prefix cache."""
    prefix_hit_tokens: int = 0
    """Tokens found there."""
    kv_tiers: TierStats | None = None
    """Of host memory and disk below the KV cache; None where there are none."""
    num_steps: int = 0
    busy_s: float = 0.0
    """Seconds that steps took on the device: forward and sampling."""
    gap_s: float = 0.0
    """Seconds that the device stood still between two steps although there was work."""
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_forced_tokens: int = 0
    """Of num_generated_tokens: what structured outputs forced, without a step of their own."""
    num_preemptions: int = 0
    num_swaps: int = 0
    """Of these, with the KV copied to host memory and back; the others are computed again."""
    kv_swap_bytes: int | None = None
    """Host memory that holds such KV now; None where there is none for it."""
    num_offline_running: int = 0
    """Of num_running; likewise below."""
    num_offline_waiting: int = 0
    num_offline_waiting_tokens: int = 0
    num_offline_decoding: int = 0
    num_offline_context_tokens: int = 0
    num_offline_preemptions: int = 0
    num_offline_held_back: int = 0
    """Times that a running offline sequence was left out of a step for online ones."""
    num_offline_generated_tokens: int = 0
    """Of num_generated_tokens."""
    step_error_ratio: float = 0.0
    """How far off the predicted times of the last steps were, on average, as a share."""
    num_aborted: int = 0
    graph_cache: GraphCacheStats = field(default_factory=GraphCacheStats)
    speculation: SpeculationStats | None = None
    """None without speculative decoding."""
    reservations: ReservationStats | None = None
    """None where no KV is taken from other instances, likewise sent to them."""
    hand_overs: HandOverStats | None = None
