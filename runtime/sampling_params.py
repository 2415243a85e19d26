"""How one request wants its tokens chosen. Names and defaults follow vLLM's SamplingParams."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from xllm_compile.runtime.pooling import PoolingParams
from xllm_compile.runtime.structured_output import StructuredOutput

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 128


class RequestOutputKind(enum.Enum):
    """What each yielded RequestOutput holds: everything so far, only what is new, or only the final result."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Sampling options of one request. Raises ValueError, naming field, value and limit, on a bad value."""

    n: int = 1
    """Completions per prompt."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Smallest set of tokens whose probability reaches top_p, in (0, 1]."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 or -1 keeps all."""
    min_p: float = 0.0
    """Drop tokens below min_p times the largest probability, in [0, 1]."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token that was generated, in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted per occurrence among the generated tokens, in [-2, 2]."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens of prompt and output, > 0."""
    seed: int | None = None
    """Same seed, prompt and options give the same tokens, whatever else runs in the batch."""
    stop: Sequence[str] = ()
    """Strings that end the completion; not part of the text unless include_stop_str_in_output."""
    stop_token_ids: Sequence[int] = ()
    """Token ids that end the completion."""
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    """Go on after the model's end-of-sequence token, until max_tokens."""
    max_tokens: int | None = 16
    """Most tokens to generate; None goes on to the model's length limit."""
    min_tokens: int = 0
    """No stop string, stop token or end-of-sequence counts before this many tokens, unless `structured` is complete."""
    logprobs: int | None = None
    """Log-probabilities of the chosen token and of this many most probable ones; 0 gives the chosen one's only."""
    prompt_logprobs: int | None = None
    """The same for each prompt token."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids, each in [-100, 100]."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    structured: StructuredOutput | None = None
    """What the completion must look like; None leaves it free."""
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    pooling: PoolingParams | None = None
    """Make an embedding of the prompt and generate nothing; see embedding_params."""
    priority: int = 0
    """Lower is served first, by the policies priority and deadline."""
    offline: bool = False
    """Best effort: runs only where no online request wants the place, and loses it first."""
    ttft_slo_ms: float | None = None
    """Wanted time from arrival to the first token; None takes the server's."""
    tpot_slo_ms: float | None = None
    """Wanted time between tokens; None takes the server's."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        checks = (
            ("n", self.n, 1 <= self.n <= 128, "in [1, 128]"),
            ("temperature", self.temperature, 0 <= self.temperature <= 100, "in [0, 100]"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k, self.top_k >= -1, "-1, 0 or positive"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]"),
            ("presence_penalty", self.presence_penalty, -2 <= self.presence_penalty <= 2, "in [-2, 2]"),
            ("frequency_penalty", self.frequency_penalty, -2 <= self.frequency_penalty <= 2, "in [-2, 2]"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                0 < self.repetition_penalty <= 100,
                "in (0, 100]",
            ),
            ("max_tokens", self.max_tokens, self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            ("min_tokens", self.min_tokens, self.min_tokens >= 0, "at least 0"),
            ("logprobs", self.logprobs, 0 <= (self.logprobs or 0) <= MAX_LOGPROBS, f"in [0, {MAX_LOGPROBS}]"),
            (
                "prompt_logprobs",
                self.prompt_logprobs,
                0 <= (self.prompt_logprobs or 0) <= MAX_LOGPROBS,
                f"in [0, {MAX_LOGPROBS}]",
            ),
            (
                "stop",
                f"<{len(self.stop)} strings>",
                len(self.stop) <= MAX_STOP_STRINGS,
                f"at most {MAX_STOP_STRINGS} strings",
            ),
            ("priority", self.priority, abs(self.priority) < 2**31, "in 32 bits"),
            ("ttft_slo_ms", self.ttft_slo_ms, self.ttft_slo_ms is None or self.ttft_slo_ms > 0, "positive"),
            ("tpot_slo_ms", self.tpot_slo_ms, self.tpot_slo_ms is None or self.tpot_slo_ms > 0, "positive"),
            ("stop", self.stop, all(self.stop), "without empty strings"),
            (
                "stop",
                f"<{max(map(len, self.stop), default=0)} characters>",
                all(len(text) <= MAX_STOP_CHARS for text in self.stop),
                f"strings of at most {MAX_STOP_CHARS} characters",
            ),
            (
                "stop_token_ids",
                f"<{len(self.stop_token_ids)} ids>",
                len(self.stop_token_ids) <= MAX_STOP_TOKEN_IDS,
                f"at most {MAX_STOP_TOKEN_IDS} ids",
            ),
            (
                "logit_bias",
                self.logit_bias,
                all(-100 <= bias <= 100 for bias in self.logit_bias.values()),
                "with each bias in [-100, 100]",
            ),
        )
        for name, value, is_good, limit in checks:
            if not is_good:
                raise ValueError(f"{name}={value!r} must be {limit}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}")
        if self.pooling is not None and self.n != 1:
            raise ValueError(f"n={self.n} must be 1 for an embedding")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1e-5


def embedding_params(pooling: PoolingParams | None = None) -> SamplingParams:
    """Of a request for an embedding, the last token's by default."""
    return SamplingParams(pooling=pooling or PoolingParams(), output_kind=RequestOutputKind.FINAL_ONLY)
