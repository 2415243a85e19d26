"""What a user asks of one compilation, checked before anything is read."""

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path

from xllm_compile.models.config import DTYPES
from xllm_compile.targets import TARGETS

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
    max_model_len: int | None = None
    """Longest sequence, prompt and output together; None is the model's own limit."""
    max_num_batched_tokens: int = 512
    """Most tokens in one step: the length of a prefill chunk, and the largest bucket."""
    buckets: tuple[int, ...] | None = None
    """Step sizes that get a graph of their own; None chooses them."""
    workload: Path | None = None
    """Requests to choose buckets for: .jsonl with input_length and output_length, or .csv with ContextTokens and
    GeneratedTokens."""
    jobs: int | None = None
    """Graphs compiled side by side; None is one per CPU as memory allows."""
    graph_mode: str = "full"
    """full: one graph per region; partial: attention runs eagerly between two graphs of a layer; eager: no graphs."""
    disabled_passes: frozenset[str] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ValueError(f"target {self.target!r} is not built yet; available: {', '.join(TARGETS)}")
        if self.graph_mode not in GRAPH_MODES:
            raise ValueError(f"graph_mode={self.graph_mode!r} is not one of {', '.join(GRAPH_MODES)}")
        if self.dtype not in ("auto", *DTYPES):
            raise ValueError(f"dtype={self.dtype!r} is not supported; supported: auto, {', '.join(DTYPES)}")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ValueError(
                f"max_model_len={self.max_model_len} must be at least 2: a prompt token and an output token"
            )
        if not 1 <= self.max_num_batched_tokens <= 65536:
            raise ValueError(f"max_num_batched_tokens={self.max_num_batched_tokens} must be in [1, 65536]")
        if self.jobs is not None and self.jobs < 1:
            raise ValueError(f"jobs={self.jobs} must be at least 1")
        if self.buckets is not None and self.workload is not None:
            raise ValueError(
                "buckets and workload exclude each other: give the step sizes, or a workload to choose them for"
            )
        bad = [size for size in self.buckets or () if not 1 <= size <= self.max_num_batched_tokens]
        if bad:
            raise ValueError(f"bucket {bad[0]} is outside [1, max_num_batched_tokens={self.max_num_batched_tokens}]")


def read_workload(path: Path) -> list[tuple[int, int]]:
    """(prompt tokens, output tokens) of each request. Raises ValueError naming file, line and what is expected."""
    keys = {".csv": ("ContextTokens", "GeneratedTokens"), ".jsonl": ("input_length", "output_length")}.get(path.suffix)
    if keys is None:
        raise ValueError(f"workload {path} must be a .csv or .jsonl file")
    if not path.is_file():
        raise ValueError(f"workload {path} does not exist")
    requests = []
    with path.open(newline="") as file:
        rows = csv.DictReader(file) if path.suffix == ".csv" else map(json.loads, file)
        try:
            for row in rows:
                requests.append((int(row[keys[0]]), int(row[keys[1]])))
        except (KeyError, ValueError, TypeError) as err:
            raise ValueError(
                f"workload {path}, request {len(requests) + 1}: needs {keys[0]} and {keys[1]} ({err!r})"
            ) from err
    if not requests:
        raise ValueError(f"workload {path} holds no request")
    return requests
