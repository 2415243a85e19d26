"""One instance: an artifact opened on this machine, ready to take requests."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from xllm_compile.runtime.artifact import (
    TOKENIZER,
    ArtifactMismatchError,
    Manifest,
    check_artifact,
    cpu_kernels,
    read_manifest,
)
from xllm_compile.runtime.engine import Engine
from xllm_compile.runtime.instance_config import InstanceConfig
from xllm_compile.runtime.instance_memory import check_memory, kv_values, open_kv_tiers, plan_kv_cache, step_limits
from xllm_compile.runtime.isa import isa_features
from xllm_compile.runtime.kv_cache import KVCache
from xllm_compile.runtime.kv_cache_config import KVCacheConfig
from xllm_compile.runtime.memory.cpu_memory import CpuMemory
from xllm_compile.runtime.memory.shared_pages import PageShare
from xllm_compile.runtime.model_runner import CompiledModelRunner
from xllm_compile.runtime.ops import native
from xllm_compile.runtime.resources import num_cpus
from xllm_compile.runtime.slowed_runner import SlowedRunner
from xllm_compile.runtime.speculative.open_speculator import open_speculator, read_draft_manifest
from xllm_compile.runtime.speculative.speculator import Speculator
from xllm_compile.runtime.step import ModelRunner
from xllm_compile.runtime.step_predictor import StepPredictor, StepPrior, prior_of
from xllm_compile.runtime.tensor_parallel import LeaderRunner, RankGroup, ReleaseMemory
from xllm_compile.runtime.tokenizer import Tokenizer
from xllm_compile.runtime.transfer.endpoint import TransferEndpoint, open_endpoint
from xllm_compile.runtime.transfer.transfer import TransferConfig
from xllm_compile.runtime.weights import map_weights, release_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedMemory:
    """An instance's part of the memory that several share (runtime/shared_models.py)."""

    share: PageShare
    kv: KVCacheConfig
    starts_asleep: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Instance:
    """What serving needs of an opened artifact."""

    root: Path
    manifest: Manifest
    engine: Engine
    tokenizer: Tokenizer
    release_weights: Callable[[bool], None]
    """Gives the memory of the weights back, for AsyncEngine.sleep."""
    is_asleep: bool = False
    """Opened without memory, until AsyncEngine.wake_up."""

    @property
    def model_name(self) -> str:
        return self.manifest.model.name

    @property
    def max_model_len(self) -> int:
        return self.engine.max_model_len

    @property
    def weights_key(self) -> str:
        """Names what KV is computed with."""
        return self.manifest.tokens_key

    @property
    def kv_layout(self) -> str:
        """Names how the bytes of a token's KV lie."""
        model, ranks = self.manifest.model, self.manifest.tensor_parallel_size
        shape = f"{model.num_layers}x2x{model.num_kv_heads}x{model.head_dim}"
        text = f"token-major {shape} {model.kv_cache_dtype} every {self.engine.kv_bytes_per_token} bytes"
        return text + (f" of {ranks} ranks" if ranks > 1 else "")


def open_instance(
    root: Path,
    config: InstanceConfig | None = None,
    group: RankGroup | None = None,
    shared: SharedMemory | None = None,
) -> Instance:
    """Open the artifact at ``root``. Weights are mapped, not read: the first step pulls them in.

    ``group`` is rank 0's for a tensor-parallel artifact; the other ranks run `follower.follow`. ``shared`` is the
    memory of an instance that has others beside it.
    Raises ArtifactMismatchError when the artifact is damaged or was built for something else, ValueError when the
    bounds cannot be met (a KV budget below one sequence), native.KernelLoadError, RuntimeError when a rank is missing.
    """
    config = config or InstanceConfig()
    manifest = read_manifest(root)
    # First what may be refused before anything is opened.
    step_limits(manifest, config)
    if shared is None:
        check_memory(
            kv_memory_bytes=config.kv_memory_bytes,
            kv_host_bytes=config.kv_host_bytes,
            kv_swap_bytes=config.kv_swap_bytes,
        )
    load_artifact_kernels(root, manifest, config)
    _say_unused(root, manifest, native.cpu_features())
    check_group(root, manifest, group)
    _check_one_rank(manifest, config)
    _check_kv_cache_dtype(root, manifest, config)
    draft = read_draft_manifest(config.speculative, manifest) if config.speculative else None
    kv_cache = _open_kv_cache(manifest, config, draft, shared)
    is_asleep = shared is not None and shared.starts_asleep
    if not is_asleep:
        kv_cache.wake_up()
    weights_file = root / manifest.weights[0].path
    weights = map_weights(weights_file)
    runner = open_runner(root, manifest, weights, kv_cache, config)
    if group is not None:
        group.publish(_for_followers(config, kv_cache))
        group.connect()
    if config.warm_up and not is_asleep:
        runner.warm_up()
    prior = _step_prior(manifest)
    tokenizer = Tokenizer.from_directory(root / TOKENIZER)
    engine = Engine(
        _led_and_slowed(runner, group, config, prior),
        kv_cache,
        tokenizer,
        config.engine,
        prior=prior,
        speculator=_open_speculator(config, manifest, draft, kv_cache.config),
        transfer=_open_transfer(config, kv_cache),
    )
    return Instance(
        root=root,
        manifest=manifest,
        engine=engine,
        tokenizer=tokenizer,
        release_weights=partial(_release_weights, weights_file, weights, kv_cache, group),
        is_asleep=is_asleep,
    )


def load_artifact_kernels(root: Path, manifest: Manifest, config: InstanceConfig) -> None:
    """And have them use this process's threads.

    Raises ArtifactMismatchError where the artifact is not for this machine or damaged, native.KernelLoadError.
    """
    kernels = cpu_kernels(root, manifest)
    check_artifact(root, manifest, isa_features(), verify_weights=config.verify_weights)
    native.load_kernels(root / kernels.path)
    _use_threads(manifest, config)


def check_group(root: Path, manifest: Manifest, group: RankGroup | None) -> None:
    """Raises ValueError where the artifact is for another number of ranks."""
    ranks, given = manifest.tensor_parallel_size, 1 if group is None else group.config.world_size
    if ranks != given:
        raise ValueError(
            f"{root} is compiled for tensor_parallel_size={ranks}, this process is one of {given};"
            f" start {ranks} ranks, or compile with --tensor-parallel-size {given}"
        )


def open_runner(
    root: Path, manifest: Manifest, weights: dict[str, Tensor], kv_cache: KVCache, config: InstanceConfig
) -> CompiledModelRunner:
    """Runs one rank's part of the artifact. Raises ArtifactMismatchError."""
    limits = step_limits(manifest, config)
    return CompiledModelRunner(
        root,
        manifest,
        weights,
        kv_cache.layers,
        max_model_len=kv_cache.config.max_model_len,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        enforce_eager=config.enforce_eager,
        # A rank that took a graph before the others would pad its steps, and its collectives, otherwise than they do.
        promotion=config.promotion if manifest.tensor_parallel_size == 1 else None,
    )


def _use_threads(manifest: Manifest, config: InstanceConfig) -> None:
    """Of this process, for torch and the kernels. Torch's own choice holds where it is less than the share."""
    num_processes, cpus = manifest.tensor_parallel_size * config.num_colocated, num_cpus()
    num_threads = config.num_threads or min(torch.get_num_threads(), max(1, cpus // num_processes))
    if num_threads > cpus:
        logger.warning(
            "%d threads on %d CPUs take turns, and steps wait for the last: give num_threads (--threads) of at most %d",
            num_threads,
            cpus,
            max(1, cpus // num_processes),
        )
    torch.set_num_threads(num_threads)
    native.set_num_threads(num_threads)


def _say_unused(root: Path, manifest: Manifest, features: Sequence[str]) -> None:
    """The artifact runs on any CPU that has what the compiling one had, with the kernels of that one."""
    if unused := [name for name in features if name not in manifest.target_features]:
        logger.warning(
            "%s was compiled on a CPU without %s, which this one has and its kernels would use: compile it here to have"
            " them",
            root,
            ", ".join(unused),
        )


def _check_one_rank(manifest: Manifest, config: InstanceConfig) -> None:
    """Raises ValueError where KV is to go somewhere that takes one rank's only."""
    num_ranks = manifest.tensor_parallel_size
    if num_ranks == 1:
        return
    if config.kv_host_bytes is not None:
        raise ValueError(
            f"kv_host_bytes={config.kv_host_bytes}: tiers hold the KV of one rank, and the artifact has {num_ranks};"
            " leave it out"
        )
    if config.kv_swap_bytes is not None:
        raise ValueError(
            f"kv_swap_bytes={config.kv_swap_bytes}: only the KV of one rank is copied out, and the artifact has"
            f" {num_ranks}; leave it out"
        )
    if config.transfers:
        raise ValueError(
            f"transfers={','.join(config.transfers)} move the KV of one rank, and the artifact has {num_ranks}; serve"
            " it without (--transfer none), or compile it for one rank"
        )


def _check_kv_cache_dtype(root: Path, manifest: Manifest, config: InstanceConfig) -> None:
    found = manifest.model.kv_cache_dtype
    if config.kv_cache_dtype not in ("auto", found):
        raise ArtifactMismatchError(
            f"{root} was compiled for a KV cache in {found}, kv_cache_dtype={config.kv_cache_dtype} was asked for;"
            f" compile it with --kv-cache-dtype {config.kv_cache_dtype}, or leave that out here"
        )


def _open_kv_cache(
    manifest: Manifest, config: InstanceConfig, draft: Manifest | None, shared: SharedMemory | None
) -> KVCache:
    """Without memory, until it is woken up."""
    kv_config = shared.kv if shared else plan_kv_cache(manifest, config, draft)
    tiers = open_kv_tiers(manifest, config, kv_config)
    share = shared.share if shared else None
    return KVCache(kv_config, tiers=tiers, share=share, swap_bytes=config.kv_swap_bytes)


def _for_followers(config: InstanceConfig, kv_cache: KVCache) -> dict[str, object]:
    """What the other ranks must have alike: also the cache's shape, so that each has the same slots."""
    plain = replace(config, promotion=None, speculative=None, transfer=None)
    return {"config": asdict(plain), "kv_cache": kv_values(kv_cache.config)}


def _step_prior(manifest: Manifest) -> StepPrior:
    """What the build says of step times."""
    return prior_of(
        manifest.step_times,
        kv_bytes_per_token=manifest.model.kv_bytes_per_token,
        weights_bytes=manifest.weights[0].num_bytes,
        max_num_batched_tokens=manifest.max_num_batched_tokens,
    )


def _open_speculator(
    config: InstanceConfig, manifest: Manifest, draft: Manifest | None, kv_config: KVCacheConfig
) -> Speculator | None:
    """None where no token is ever guessed."""
    if config.speculative is None and not config.jump_forward:
        return None
    return open_speculator(
        config.speculative,
        manifest,
        draft,
        kv_config,
        enforce_eager=config.enforce_eager,
        warm_up=config.warm_up,
    )


def _led_and_slowed(
    runner: ModelRunner, group: RankGroup | None, config: InstanceConfig, prior: StepPrior
) -> ModelRunner:
    """The runner as the engine drives it: the other ranks run with it, and each step lasts as long as is asked for."""
    if group is not None:
        runner = LeaderRunner(runner, group)
    if config.slow_down > 1:
        believed = StepPredictor(prior)
        runner = SlowedRunner(runner, lambda load: config.slow_down * believed.seconds(load))
    return runner


def _open_transfer(config: InstanceConfig, kv_cache: KVCache) -> TransferEndpoint | None:
    if not config.transfers:
        return None
    memory = kv_cache.xtensor.memory
    assert isinstance(memory, CpuMemory), "other devices are not served yet"
    return open_endpoint(config.transfers, memory.region, config.transfer or TransferConfig(), native.copy_bytes())


def _release_weights(
    path: Path, weights: dict[str, Tensor], kv_cache: KVCache, group: RankGroup | None, from_cache: bool
) -> None:
    """On all ranks; on the others the memory of KV as well, which this one's engine gives back by itself."""
    if group is not None:
        if kv_cache.used_tokens:
            raise ValueError(
                f"paused requests hold {kv_cache.used_tokens} tokens of KV on {group.config.world_size} ranks; resume"
                " or abort them before the model sleeps"
            )
        group.send_release(ReleaseMemory(from_cache=from_cache))
    release_weights(weights, path, from_cache=from_cache)
