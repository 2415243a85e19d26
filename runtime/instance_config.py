"""What an instance may be told when it is opened: its bounds, its memory and its policies."""

from dataclasses import dataclass
from pathlib import Path

from xllm_compile.runtime.engine_config import EngineConfig
from xllm_compile.runtime.policies.order import PolicyChoice
from xllm_compile.runtime.promotion import PromotionConfig
from xllm_compile.runtime.speculative.config import SpeculativeConfig
from xllm_compile.runtime.transfer.transfer import TransferConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class InstanceConfig:
    """Bounds of one instance; None takes the artifact's or the machine's own."""

    max_num_seqs: int | None = None
    """Most sequences running at the same time; None is 64, or the tokens of a step where those are fewer."""
    max_num_batched_tokens: int | None = None
    """Most tokens in one step; None is what the artifact was compiled for."""
    max_model_len: int | None = None
    """Longest sequence in tokens; None is the artifact's limit, lowered to what kv_memory_bytes holds."""
    num_colocated: int = 1
    """Instances that share this machine's CPUs and free memory, this one included."""
    num_threads: int | None = None
    """Threads that compute, in each rank; None is an equal share of the CPUs."""
    kv_memory_bytes: int | None = None
    """Budget of the KV cache; None is half of the free memory, or what max_num_seqs full sequences need."""
    max_waiting: int = 1024
    """Most sequences that wait; likewise prompt tokens."""
    max_waiting_tokens: int = 4 * 1024 * 1024
    kv_cache_dtype: str = "auto"
    """What the artifact must have been compiled with; auto takes any."""
    prefix_cache: bool = True
    """Keep the KV of what was computed for requests that start alike."""
    kv_pretouch: bool = False
    """Have all of the KV cache's memory before the first request, instead of page by page."""
    kv_host_bytes: int | None = None
    """Host memory for KV that lost its pages; None keeps none. Needs the prefix cache."""
    kv_swap_bytes: int | None = None
    """Host memory for the KV of preempted sequences; None has it computed again."""
    kv_disk: Path | None = None
    """Folder for what host memory has no room for; None keeps nothing on disk."""
    kv_disk_bytes: int = 16 << 30
    """Bound of the folder."""
    kv_store: str | None = None
    """mooncake://HOST:PORT of a store that instances share, for the same; None has none."""
    kv_store_bytes: int = 1 << 30
    """Memory that this instance lends to it."""
    scheduling_policy: PolicyChoice = "auto"
    ttft_slo_ms: float | None = None
    """Wanted time to the first token of online requests that name none; likewise between tokens."""
    tpot_slo_ms: float | None = None
    async_scheduling: bool = True
    """Plan a step and report the last one while the device runs the one between."""
    enforce_eager: bool = False
    """Run operator by operator instead of the compiled graphs, to tell the two apart."""
    promotion: PromotionConfig | None = None
    """Compile graphs for hot sizes while serving; None does not."""
    speculative: SpeculativeConfig | None = None
    """Guess tokens and verify several in one step; None does not."""
    jump_forward: bool = True
    """Tokens that a structured output forces ride in the step of the one before them. False gives each a step of its
    own, with the same output, where there is no `speculative`: to measure what they take."""
    warm_up: bool = False
    """Run every graph once before the first request, which brings the weights in from disk."""
    verify_weights: bool = False
    """Check the weights file byte for byte before serving."""
    slow_down: float = 1.0
    """Above 1 a step lasts so many times what the build predicts for it, asleep for the rest (slowed_runner.py)."""
    transfers: tuple[str, ...] = ()
    """Ways to take KV from other instances and to send it to them (runtime/transfer); none by default."""
    transfer: TransferConfig | None = None
    """How they do it; None stays on this machine."""

    def __post_init__(self) -> None:
        for name in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_model_len",
            "num_threads",
            "kv_memory_bytes",
            "max_waiting",
            "max_waiting_tokens",
            "kv_host_bytes",
            "kv_swap_bytes",
            "kv_disk_bytes",
            "kv_store_bytes",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for name in ("kv_disk", "kv_store"):
            if getattr(self, name) is not None and self.kv_host_bytes is None:
                value, below = getattr(self, name), "lies below host memory"
                raise ValueError(f"{name}={value} {below}; give kv_host_bytes (--kv-host-memory) as well")
        if self.kv_host_bytes is not None and not self.prefix_cache:
            raise ValueError(f"kv_host_bytes={self.kv_host_bytes} needs prefix_cache, which is off; leave one out")
        if self.slow_down < 1:
            raise ValueError(f"slow_down={self.slow_down} must be at least 1, which is as fast as the machine is")

    @property
    def engine(self) -> EngineConfig:
        """The engine's part of it."""
        return EngineConfig(
            max_waiting=self.max_waiting,
            max_waiting_tokens=self.max_waiting_tokens,
            async_scheduling=self.async_scheduling,
            scheduling_policy=self.scheduling_policy,
            ttft_slo_ms=self.ttft_slo_ms,
            tpot_slo_ms=self.tpot_slo_ms,
        )
