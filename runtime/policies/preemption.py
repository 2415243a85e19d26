"""What a preempted sequence costs: computing its KV again, or copying it to the host and back."""

from dataclasses import dataclass

from xllm_compile.runtime.policies.chunk import StepLoad, StepSeconds


@dataclass(frozen=True, kw_only=True, slots=True)
class SwapPath:
    """The way from a device's KV cache to host memory and back."""

    bytes_per_s: float
    """Of one direction."""
    kv_bytes_per_token: int
    latency_s: float = 0.0
    """Of one copy."""

    def __post_init__(self) -> None:
        for name in ("bytes_per_s", "kv_bytes_per_token"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")

    def seconds(self, num_tokens: int) -> float:
        """Out and back."""
        return 2 * (self.latency_s + num_tokens * self.kv_bytes_per_token / self.bytes_per_s)


def recompute_s(num_tokens: int, max_chunk_tokens: int, model: StepSeconds) -> float:
    """Seconds to prefill so many tokens again, in steps of their own."""
    seconds = 0.0
    for begin in range(0, num_tokens, max_chunk_tokens):
        seconds += model.seconds(StepLoad().plus(begin, min(max_chunk_tokens, num_tokens - begin)))
    return seconds


def swap_pays(num_tokens: int, max_chunk_tokens: int, model: StepSeconds, path: SwapPath) -> bool:
    """Whether copying is sooner done. Where host and device share one memory there is no path: it never pays."""
    return path.seconds(num_tokens) < recompute_s(num_tokens, max_chunk_tokens, model)
