"""What a user asks of one compilation, checked before anything is read."""

from dataclasses import dataclass, field
from pathlib import Path

from xllm_compile.graph_passes.quantisation import Quantisation
from xllm_compile.models.config import DTYPES
from xllm_compile.targets import TARGETS, unknown_target

KV_CACHE_DTYPES = ("auto", "int8")
GRAPH_MODES = ("full", "partial", "eager")
MAX_BUCKETS_BY_DEFAULT = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildConfig:
    """Raises ValueError, naming field, value and limit, on a bad value."""

    model_dir: Path
    output: Path
    target: str = "cpu"
    dtype: str = "auto"
    """bfloat16, float32, or auto: the checkpoint's (float16 becomes bfloat16)."""
    kv_cache_dtype: str = "auto"
    """int8: half of what a bfloat16 cache takes, keys and values are rounded as they are written; auto: dtype."""
    max_model_len: int | None = None
    """Longest sequence, prompt and output together; None is the model's own limit."""
    max_num_batched_tokens: int = 512
    """Most tokens in one step: the length of a prefill chunk, and the largest bucket."""
    buckets: tuple[int, ...] | None = None
    """Step sizes that get a graph of their own; None chooses them."""
    workload: Path | None = None
    """Requests to choose buckets for, in a format that request_trace reads."""
    device_spec: Path | None = None
    """What step times are predicted with: a .json file or a built-in name; None is what xllm-bench calibrate found
    on this machine, or else the built-in one."""
    jobs: int | None = None
    """Graphs compiled side by side; None is one per CPU as memory allows."""
    graph_mode: str = "full"
    """full: one graph per region; partial: attention runs eagerly between two graphs of a layer; eager: no graphs."""
    tensor_parallel_size: int = 1
    """Ranks that share each layer: heads and feed-forward size are cut over them."""
    disabled_passes: frozenset[str] = field(default_factory=frozenset)
    quantisation: Quantisation | None = None

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise unknown_target(self.target)
        if self.graph_mode not in GRAPH_MODES:
            raise ValueError(f"graph_mode={self.graph_mode!r} is not one of {', '.join(GRAPH_MODES)}")
        if self.target == "npu" and self.graph_mode != "full":
            raise ValueError(f"graph_mode={self.graph_mode!r} is not built for target npu; leave it at full")
        if self.target == "npu" and self.buckets is not None and self.max_num_batched_tokens not in self.buckets:
            raise ValueError(
                "target npu has no dynamic-shape graph: give a bucket of"
                f" max_num_batched_tokens={self.max_num_batched_tokens} too, or lower that"
            )
        if self.dtype not in ("auto", *DTYPES):
            raise ValueError(f"dtype={self.dtype!r} is not supported; supported: auto, {', '.join(DTYPES)}")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ValueError(
                f"kv_cache_dtype={self.kv_cache_dtype!r} is not supported; supported: {', '.join(KV_CACHE_DTYPES)}"
            )
        if self.target == "npu" and self.kv_cache_dtype != "auto":
            raise ValueError(f"kv_cache_dtype={self.kv_cache_dtype} is for the cpu target; leave it out for the npu")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ValueError(
                f"max_model_len={self.max_model_len} must be at least 2: a prompt token and an output token"
            )
        if not 1 <= self.max_num_batched_tokens <= 65536:
            raise ValueError(f"max_num_batched_tokens={self.max_num_batched_tokens} must be in [1, 65536]")
        if self.jobs is not None and self.jobs < 1:
            raise ValueError(f"jobs={self.jobs} must be at least 1")
        if self.tensor_parallel_size < 1:
            raise ValueError(f"tensor_parallel_size={self.tensor_parallel_size} must be at least 1")
        if self.buckets is not None and self.workload is not None:
            raise ValueError(
                "buckets and workload exclude each other: give the step sizes, or a workload to choose them for"
            )
        bad = [size for size in self.buckets or () if not 1 <= size <= self.max_num_batched_tokens]
        if bad:
            raise ValueError(f"bucket {bad[0]} is outside [1, max_num_batched_tokens={self.max_num_batched_tokens}]")
