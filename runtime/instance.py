"""One instance: an artifact opened on this machine, ready to take requests."""

from dataclasses import dataclass
from pathlib import Path

import torch

from xllm_compile.runtime.artifact import TOKENIZER, Manifest, check_artifact, cpu_kernels, read_manifest
from xllm_compile.runtime.engine import Engine, EngineConfig
from xllm_compile.runtime.isa import isa_features
from xllm_compile.runtime.kv_cache import KVCache, KVCacheConfig
from xllm_compile.runtime.model_runner import CompiledModelRunner
from xllm_compile.runtime.ops import native
from xllm_compile.runtime.promotion import PromotionConfig
from xllm_compile.runtime.tokenizer import Tokenizer
from xllm_compile.runtime.weights import map_weights

_DEFAULT_KV_SHARE = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class InstanceConfig:
    """Bounds of one instance; None takes the artifact's or the machine's own."""

    max_num_seqs: int = 64
    """Most sequences running at the same time."""
    max_num_batched_tokens: int | None = None
    """Most tokens in one step; None is what the artifact was compiled for."""
    max_model_len: int | None = None
    """Longest sequence in tokens; None is the artifact's limit, lowered to what kv_memory_bytes holds."""
    kv_memory_bytes: int | None = None
    """Budget of the KV cache; None is half of the free memory, or what max_num_seqs full sequences need."""
    max_waiting: int = 1024
    enforce_eager: bool = False
    """Run operator by operator instead of the compiled graphs, to tell the two apart."""
    promotion: PromotionConfig | None = None
    """Compile graphs for hot sizes while serving; None does not."""
    verify_weights: bool = False
    """Check the weights file byte for byte before serving."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "kv_memory_bytes", "max_waiting"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Instance:
    root: Path
    manifest: Manifest
    engine: Engine
    tokenizer: Tokenizer

    @property
    def model_name(self) -> str:
        return self.manifest.model.name

    @property
    def max_model_len(self) -> int:
        return self.engine.max_model_len


def open_instance(root: Path, config: InstanceConfig | None = None) -> Instance:
    """Open the artifact at ``root``. Weights are mapped, not read: the first step pulls them in.

    Raises ArtifactMismatchError when the artifact is damaged or was built for something else, ValueError when the
    bounds cannot be met (a KV budget below one sequence), native.KernelLoadError.
    """
    config = config or InstanceConfig()
    manifest = read_manifest(root)
    kernels = cpu_kernels(root, manifest)
    check_artifact(root, manifest, isa_features(), verify_weights=config.verify_weights)
    native.load_kernels(root / kernels.path)
    kv_cache = KVCache(_kv_config(manifest, config))
    runner = CompiledModelRunner(
        root,
        manifest,
        map_weights(root / manifest.weights.path),
        kv_cache.layers,
        max_model_len=kv_cache.config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens or manifest.max_num_batched_tokens,
        enforce_eager=config.enforce_eager,
        promotion=config.promotion,
    )
    tokenizer = Tokenizer.from_directory(root / TOKENIZER)
    engine = Engine(runner, kv_cache, tokenizer, EngineConfig(max_waiting=config.max_waiting))
    return Instance(root=root, manifest=manifest, engine=engine, tokenizer=tokenizer)


def _kv_config(manifest: Manifest, config: InstanceConfig) -> KVCacheConfig:
    model = manifest.model
    limit = config.max_model_len or model.max_model_len
    if limit > model.max_model_len:
        raise ValueError(
            f"max_model_len={limit} is above the {model.max_model_len} tokens the artifact was compiled for;"
            " lower it, or compile with a larger --max-model-len"
        )
    budget = config.kv_memory_bytes
    if budget is None:
        wanted = config.max_num_seqs * limit * model.kv_bytes_per_token
        budget = min(wanted, int(_available_memory_bytes() * _DEFAULT_KV_SHARE))
        if config.max_model_len is None:
            # Nobody asked for the full length: serve what fits rather than refuse to start.
            limit = min(limit, max(budget // model.kv_bytes_per_token, 1))
    return KVCacheConfig(
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        dtype=getattr(torch, model.dtype),
        max_model_len=limit,
        num_slots=config.max_num_seqs,
        kv_memory_bytes=budget,
    )


def _available_memory_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable line")
