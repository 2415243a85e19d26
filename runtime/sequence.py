"""State of a request and of its sequences. Data only: the scheduler decides, the engine changes it."""

import enum
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from xllm_compile.runtime.detokenizer import Detokenizer
from xllm_compile.runtime.hand_over import HandOver, Push
from xllm_compile.runtime.memory.prefix_cache import BlockChain
from xllm_compile.runtime.memory.swap_space import SwappedKV
from xllm_compile.runtime.outputs import FinishReason, Logprob, RequestMetrics
from xllm_compile.runtime.sampler import SamplingState
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.runtime.speculative.proposer import Speculation

# Each row of logits is a vocabulary of float32; this bounds what one chunk with prompt_logprobs asks for.
MAX_PROMPT_LOGPROB_ROWS = 256


class SequenceStatus(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    HANDING_OVER = "handing_over"
    """Computed; its KV is on the way to another instance."""
    FINISHED = "finished"


@dataclass(eq=False, kw_only=True, slots=True)
class Sequence:
    """One completion in the making. Compared by identity."""

    request: "Request"
    index: int
    """Which of the request's n completions."""
    token_ids: list[int]
    """Prompt, then output. After a preemption all of it is computed again."""
    sampling: SamplingState
    detokenizer: Detokenizer
    status: SequenceStatus = SequenceStatus.WAITING
    number: int = 0
    """Grows with arrival at the engine, which sets it."""
    num_kv_blocks: int = 0
    """KV pages that no other sequence shares, as of the step that is being planned."""
    num_unheld_blocks: int = 0
    """While it waits: KV pages of num_computed_tokens that nobody holds, likewise."""
    chain: BlockChain | None = None
    """Digests of its blocks of tokens."""
    num_computed_tokens: int = 0
    """While it waits: tokens that it would find in the prefix cache. Then tokens whose keys and values are in the slot,
    or will be once the launched steps have run."""
    num_pending_tokens: int = 0
    """Tokens sampled by launched steps whose results have not arrived: part of num_tokens, not yet of token_ids."""
    num_draft_tokens: int = 0
    """Drafted tokens that launched steps may add on top of the pending ones; the slot has room for them."""
    speculation: Speculation | None = None
    """Of the device's thread; the host only reads what is wanted."""
    slot: int | None = None
    swapped: SwappedKV | None = None
    """While it waits after a preemption: its KV, if that was copied out."""
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    pooled: Tensor | None = None
    """[E] what the chunks so far add up to, for an embedding."""
    embedding: npt.NDArray[np.float32] | None = None
    push: Push | None = None
    """Sends its KV to another instance."""
    num_tokens_sent: int = 0
    """Output tokens that were part of a DELTA output."""
    num_resumed_tokens: int = 0
    """Output tokens that another instance generated: no output of this one has them."""
    is_end_sent: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated and known."""
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_uncomputed_tokens(self) -> int:
        """0 while the last token is, or may be, pending: there is nothing to compute after it."""
        if self.num_left_tokens <= 0:
            return 0
        return self.num_tokens - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether what is left to compute is one generated token."""
        return self.is_behind_prompt and self.num_uncomputed_tokens == 1

    @property
    def is_behind_prompt(self) -> bool:
        """Whether the prompt is computed, or will be by launched steps."""
        return self.num_computed_tokens >= self.num_prompt_tokens

    @property
    def num_left_tokens(self) -> int:
        """Tokens that may still be generated after those that launched steps bring at most."""
        num_coming = self.num_pending_tokens + self.num_draft_tokens
        return self._max_output_tokens - self.num_output_tokens - num_coming

    @property
    def max_chunk_tokens(self) -> int:
        """Most tokens of one prefill chunk."""
        if self.wants_prompt_logprobs:
            return MAX_PROMPT_LOGPROB_ROWS
        return self.num_uncomputed_tokens

    @property
    def num_growth_tokens(self) -> int:
        """Tokens that may be stored after the uncomputed ones: those to come but the last, which nothing follows."""
        return max(0, self._max_output_tokens - self.num_output_tokens - self.num_pending_tokens - 1)

    @property
    def _max_output_tokens(self) -> int:
        """With the tokens generated elsewhere. What is handed over goes on elsewhere after one token."""
        most = self.request.max_output_tokens
        return most if self.request.hand_over is None else min(most, self.num_resumed_tokens + 1)

    @property
    def is_offline(self) -> bool:
        return self.request.params.offline

    @property
    def priority(self) -> int:
        return self.request.params.priority

    @property
    def is_begun(self) -> bool:
        return self.request.is_begun

    @property
    def tpot_slo_s(self) -> float | None:
        return self.request.metrics.tpot_slo_s

    @property
    def first_deadline_s(self) -> float:
        """When the first token is due; minus infinity once it is known, or where it was due at another instance."""
        if self.num_output_tokens > 0 or self.is_begun:
            return -math.inf
        target_s = self.request.metrics.ttft_slo_s
        return math.inf if target_s is None else self.request.metrics.arrival_s + target_s

    @property
    def next_due_s(self) -> float:
        """When the token after the known and the pending ones is due, counted from the first, wherever it came from."""
        metrics = self.request.metrics
        first_s, target_s = metrics.first_token_s, metrics.tpot_slo_s
        num_tokens = self.num_output_tokens + self.num_pending_tokens
        if self.request.answer_began_s is not None:
            first_s = self.request.answer_began_s
        else:
            num_tokens -= self.num_resumed_tokens
        if first_s is None or target_s is None:
            return math.inf
        return first_s + num_tokens * target_s

    @property
    def wants_prompt_logprobs(self) -> bool:
        """The first of n sequences collects them, once: not again when it is computed again."""
        request = self.request
        wants_any = request.prompt_logprobs is not None
        return self.index == 0 and wants_any and request.num_prompt_logprobs_asked < self.num_prompt_tokens

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    def rewind(self) -> None:
        """Back to waiting with nothing computed; what was generated stays and so does the random generator."""
        self.status = SequenceStatus.WAITING
        self.num_computed_tokens = self.num_kv_blocks = 0
        self.pooled = None
        self.slot = None

    def finish(self, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        self.status = SequenceStatus.FINISHED
        self.finish_reason = reason
        self.stop_reason = stop_reason


@dataclass(eq=False, kw_only=True, slots=True)
class Request:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    metrics: RequestMetrics
    max_output_tokens: int
    """max_tokens, and what max_model_len leaves."""
    sequences: list[Sequence] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """Grows with the chunks; None when not asked for."""
    num_prompt_logprobs_asked: int = 1
    """Prompt positions whose log-probabilities launched steps bring; the first position never has any."""
    num_cached_tokens: int = 0
    """Of the prompt, when its first sequence was first started."""
    is_prompt_sent: bool = False
    is_begun: bool = False
    """Another instance had it before."""
    answer_began_s: float | None = None
    """When its first token came, of which another instance told; None where it is this one's, or nobody says."""
    reservation_id: str = ""
    """Of the slot that waits for it, with KV that another instance computed,"""
    num_kv_tokens: int = 0
    """that of so many tokens from the start. Of a request that was handed over: what the receiver has."""
    hand_over: HandOver | None = None
    """Where its KV goes, instead of more than one token being generated here."""

    @property
    def is_finished(self) -> bool:
        return all(sequence.is_finished for sequence in self.sequences)


def num_queued_tokens(sequences: Iterable[Sequence]) -> int:
    """Tokens that waiting sequences still have to prefill."""
    return sum(sequence.num_uncomputed_tokens for sequence in sequences)
