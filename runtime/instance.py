"""One instance: an artifact opened on this machine, ready to take requests."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
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
from xllm_compile.runtime.engine_config import EngineConfig
from xllm_compile.runtime.isa import isa_features
from xllm_compile.runtime.kv_cache import KVCache
from xllm_compile.runtime.kv_cache_config import KVCacheConfig
from xllm_compile.runtime.memory.cpu_memory import HUGE_PAGE_BYTES, CpuMemory
from xllm_compile.runtime.memory.kv_tiers import DiskTier, KVTiers
from xllm_compile.runtime.memory.page_ops import replay
from xllm_compile.runtime.memory.remote_tier import RemoteTier
from xllm_compile.runtime.memory.shared_pages import PageShare
from xllm_compile.runtime.model_runner import CompiledModelRunner
from xllm_compile.runtime.ops import native
from xllm_compile.runtime.policies.order import PolicyChoice
from xllm_compile.runtime.policies.state import Limits
from xllm_compile.runtime.promotion import PromotionConfig
from xllm_compile.runtime.resources import available_memory_bytes, num_cpus, total_memory_bytes
from xllm_compile.runtime.slowed_runner import SlowedRunner
from xllm_compile.runtime.speculative.config import SpeculativeConfig
from xllm_compile.runtime.speculative.open_speculator import open_speculator, read_draft_manifest
from xllm_compile.runtime.step import ModelRunner
from xllm_compile.runtime.step_predictor import StepPredictor, prior_of
from xllm_compile.runtime.tensor_parallel import LeaderRunner, RankGroup, ReleaseMemory
from xllm_compile.runtime.tokenizer import Tokenizer
from xllm_compile.runtime.transfer.endpoint import TransferEndpoint, open_endpoint
from xllm_compile.runtime.transfer.transfer import TransferConfig
from xllm_compile.runtime.weights import map_weights, release_weights

logger = logging.getLogger(__name__)

_DEFAULT_KV_SHARE = 0.5
_DEFAULT_NUM_SEQS = 64


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


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedMemory:
    """An instance's part of the memory that several share (runtime/shared_models.py)."""

    share: PageShare
    kv: KVCacheConfig
    starts_asleep: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Instance:
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

    ``group`` is rank 0's for a tensor-parallel artifact; the other ranks run ``follow``. ``shared`` is the memory of an
    instance that has others beside it.
    Raises ArtifactMismatchError when the artifact is damaged or was built for something else, ValueError when the
    bounds cannot be met (a KV budget below one sequence), native.KernelLoadError, RuntimeError when a rank is missing.
    """
    config = config or InstanceConfig()
    manifest = read_manifest(root)
    step_limits(manifest, config)
    if shared is None:
        check_memory(
            kv_memory_bytes=config.kv_memory_bytes,
            kv_host_bytes=config.kv_host_bytes,
            kv_swap_bytes=config.kv_swap_bytes,
        )
    kernels = cpu_kernels(root, manifest)
    check_artifact(root, manifest, isa_features(), verify_weights=config.verify_weights)
    native.load_kernels(root / kernels.path)
    _use_threads(manifest, config)
    _say_unused(root, manifest, native.cpu_features())
    _check_group(root, manifest, group)
    _check_kv_cache_dtype(root, manifest, config)
    draft = read_draft_manifest(config.speculative, manifest) if config.speculative else None
    kv_config = shared.kv if shared else _kv_config(manifest, config, draft)
    tiers = _kv_tiers(manifest, config, kv_config)
    if config.kv_swap_bytes is not None and group is not None:
        raise ValueError(
            f"kv_swap_bytes={config.kv_swap_bytes}: only the KV of one rank is copied out, and the artifact has"
            f" {manifest.tensor_parallel_size}; leave it out"
        )
    if config.transfers and manifest.tensor_parallel_size > 1:
        raise ValueError(
            f"transfers={','.join(config.transfers)} move the KV of one rank, and the artifact has"
            f" {manifest.tensor_parallel_size}; serve it without (--transfer none), or compile it for one rank"
        )
    share = shared.share if shared else None
    kv_cache = KVCache(kv_config, tiers=tiers, share=share, swap_bytes=config.kv_swap_bytes)
    is_asleep = shared is not None and shared.starts_asleep
    if not is_asleep:
        kv_cache.wake_up()
    own_weights = map_weights(root / manifest.weights[0].path)
    own_runner = _runner(root, manifest, own_weights, kv_cache, config)
    runner: ModelRunner = own_runner
    if group is not None:
        group.publish(
            {
                "config": asdict(replace(config, promotion=None, speculative=None, transfer=None)),
                "kv_cache": _kv_values(kv_cache.config),
            }
        )
        group.connect()
        runner = LeaderRunner(runner, group)
    if config.warm_up and not is_asleep:
        own_runner.warm_up()
    tokenizer = Tokenizer.from_directory(root / TOKENIZER)
    engine_config = EngineConfig(
        max_waiting=config.max_waiting,
        max_waiting_tokens=config.max_waiting_tokens,
        async_scheduling=config.async_scheduling,
        scheduling_policy=config.scheduling_policy,
        ttft_slo_ms=config.ttft_slo_ms,
        tpot_slo_ms=config.tpot_slo_ms,
    )
    prior = prior_of(
        manifest.step_times,
        kv_bytes_per_token=manifest.model.kv_bytes_per_token,
        weights_bytes=manifest.weights[0].num_bytes,
        max_num_batched_tokens=manifest.max_num_batched_tokens,
    )
    if config.slow_down > 1:
        believed = StepPredictor(prior)
        runner = SlowedRunner(runner, lambda load: config.slow_down * believed.seconds(load))
    speculator = None
    if config.speculative is not None or config.jump_forward:
        speculator = open_speculator(
            config.speculative,
            manifest,
            draft,
            kv_cache.config,
            enforce_eager=config.enforce_eager,
            warm_up=config.warm_up,
        )
    engine = Engine(
        runner,
        kv_cache,
        tokenizer,
        engine_config,
        prior=prior,
        speculator=speculator,
        transfer=_open_transfer(config, kv_cache),
    )
    release = partial(_release_weights, root / manifest.weights[0].path, own_weights, kv_cache, group)
    return Instance(
        root=root,
        manifest=manifest,
        engine=engine,
        tokenizer=tokenizer,
        release_weights=release,
        is_asleep=is_asleep,
    )


def _open_transfer(config: InstanceConfig, kv_cache: KVCache) -> TransferEndpoint | None:
    if not config.transfers:
        return None
    memory = kv_cache.xtensor.memory
    assert isinstance(memory, CpuMemory), "other devices are not served yet"
    return open_endpoint(config.transfers, memory.region, config.transfer or TransferConfig(), native.copy_bytes())


def follow(root: Path, group: RankGroup) -> None:
    """Run the steps of rank 0 on this rank's part of the artifact, until rank 0 closes the group.

    Raises what open_instance raises, RuntimeError when rank 0 is gone.
    """
    manifest = read_manifest(root)
    _check_group(root, manifest, group)
    published = group.published()
    config = InstanceConfig(**published["config"])
    check_artifact(root, manifest, isa_features(), verify_weights=config.verify_weights)
    native.load_kernels(root / cpu_kernels(root, manifest).path)
    _use_threads(manifest, config)
    values = published["kv_cache"]
    kv_cache = KVCache(KVCacheConfig(**{**values, "dtype": getattr(torch, values["dtype"])}))
    weights = map_weights(root / manifest.weights[group.config.rank].path)
    runner = _runner(root, manifest, weights, kv_cache, config)
    group.connect()
    if config.warm_up:
        runner.warm_up()
    while (message := group.receive()) is not None:
        if isinstance(message, ReleaseMemory):
            # Where pages are mapped does not matter: rank 0 unmaps them with the next step.
            kv_cache.give_back()
            release_weights(weights, root / manifest.weights[group.config.rank].path, from_cache=message.from_cache)
            continue
        replay(message.page_ops, kv_cache.xtensor)
        runner.execute(message)
    group.close()


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


def _runner(
    root: Path, manifest: Manifest, weights: dict[str, Tensor], kv_cache: KVCache, config: InstanceConfig
) -> CompiledModelRunner:
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


def _check_group(root: Path, manifest: Manifest, group: RankGroup | None) -> None:
    ranks, given = manifest.tensor_parallel_size, 1 if group is None else group.config.world_size
    if ranks != given:
        raise ValueError(
            f"{root} is compiled for tensor_parallel_size={ranks}, this process is one of {given};"
            f" start {ranks} ranks, or compile with --tensor-parallel-size {given}"
        )


def _check_kv_cache_dtype(root: Path, manifest: Manifest, config: InstanceConfig) -> None:
    found = manifest.model.kv_cache_dtype
    if config.kv_cache_dtype not in ("auto", found):
        raise ArtifactMismatchError(
            f"{root} was compiled for a KV cache in {found}, kv_cache_dtype={config.kv_cache_dtype} was asked for;"
            f" compile it with --kv-cache-dtype {config.kv_cache_dtype}, or leave that out here"
        )


def _kv_values(config: KVCacheConfig) -> dict[str, Any]:
    """The cache's shape, so that every rank has the same slots."""
    return {**asdict(config), "dtype": str(config.dtype).removeprefix("torch.")}


def check_model_len(manifest: Manifest, config: InstanceConfig) -> int:
    """The longest sequence in tokens, as far as memory goes. Raises ValueError where more was asked for."""
    limit = config.max_model_len or manifest.model.max_model_len
    if limit > manifest.model.max_model_len:
        raise ValueError(
            f"max_model_len={limit} is above the {manifest.model.max_model_len} tokens the artifact was compiled for;"
            " lower it, or compile with a larger --max-model-len"
        )
    return limit


def step_limits(manifest: Manifest, config: InstanceConfig) -> Limits:
    """What one step takes. Raises ValueError where not every sequence could decode in it."""
    num_tokens = config.max_num_batched_tokens or manifest.max_num_batched_tokens
    num_seqs = config.max_num_seqs or min(_DEFAULT_NUM_SEQS, num_tokens)
    return Limits(max_num_seqs=num_seqs, max_num_batched_tokens=num_tokens)


def check_memory(**asked_bytes: int | None) -> None:
    """Raise ValueError where more is asked for, in all, than this process may have: it would be killed once
    that is used."""
    given = {name: value for name, value in asked_bytes.items() if value is not None}
    total = total_memory_bytes()
    if sum(given.values()) > total:
        parts = " and ".join(f"{name}={value}" for name, value in given.items())
        raise ValueError(f"{parts} are more than the {total} bytes of memory that there are; lower them")


def kv_shape(manifest: Manifest, config: InstanceConfig) -> dict[str, Any]:
    """The fields of a KVCacheConfig but for its size."""
    model = manifest.model
    return {
        "num_layers": model.num_layers,
        "num_kv_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "dtype": getattr(torch, model.kv_cache_dtype),
        "num_slots": step_limits(manifest, config).max_num_seqs,
        "pretouch": config.kv_pretouch,
        "prefix_cache": config.prefix_cache and not _depends_on_length(manifest),
    }


def _kv_config(manifest: Manifest, config: InstanceConfig, draft: Manifest | None) -> KVCacheConfig:
    model = manifest.model
    limit = check_model_len(manifest, config)
    # The draft model's cache holds the same tokens and shares the budget.
    token_bytes = model.kv_bytes_per_token + (draft.model.kv_bytes_per_token if draft else 0)
    shape = kv_shape(manifest, config)
    share = model.kv_bytes_per_token / token_bytes
    if config.kv_memory_bytes is not None:
        return KVCacheConfig(**shape, max_model_len=limit, kv_memory_bytes=int(config.kv_memory_bytes * share))
    # A sequence's last page may be all but empty, and a page counts in whole tokens, which padding may make 15 of 16.
    wanted = shape["num_slots"] * (limit * model.kv_bytes_per_token * 9 // 8 + HUGE_PAGE_BYTES)
    # The ranks of an instance are taken to share one machine.
    free = available_memory_bytes() // (manifest.tensor_parallel_size * config.num_colocated)
    budget = min(wanted, int(free * _DEFAULT_KV_SHARE * share))
    if config.max_model_len is None:
        # Nobody asked for the full length: serve what fits rather than refuse to start.
        least = KVCacheConfig(**shape, max_model_len=1, kv_memory_bytes=budget)
        limit = min(limit, least.num_pages * least.page_tokens)
    return KVCacheConfig(**shape, max_model_len=limit, kv_memory_bytes=budget)


def _kv_tiers(manifest: Manifest, config: InstanceConfig, kv: KVCacheConfig) -> KVTiers | None:
    if config.kv_host_bytes is None:
        return None
    if manifest.tensor_parallel_size > 1:
        raise ValueError(
            f"kv_host_bytes={config.kv_host_bytes}: tiers hold the KV of one rank, and the artifact has"
            f" {manifest.tensor_parallel_size}; leave it out"
        )
    if not kv.prefix_cache:
        raise ValueError(
            f"kv_host_bytes={config.kv_host_bytes}: this model's KV depends on the length of its prompt and cannot be"
            " used again; leave it out"
        )
    disk, store, layout = None, None, _block_layout(manifest, kv)
    if config.kv_disk is not None:
        try:
            disk = DiskTier(config.kv_disk, max_bytes=config.kv_disk_bytes, layout=layout)
        except OSError as err:
            raise ValueError(
                f"kv_disk={config.kv_disk} cannot be used: {err.strerror}; give a folder that can be written to"
            ) from err
    if config.kv_store is not None:
        from xllm_compile.runtime.memory.mooncake_store import mooncake_connector

        store = RemoteTier(mooncake_connector(config.kv_store, config.kv_store_bytes), layout=layout)
    return KVTiers(host_bytes=config.kv_host_bytes, disk=disk, store=store)


def _block_layout(manifest: Manifest, kv: KVCacheConfig) -> str:
    """Names all that the content of a block depends on beside its tokens."""
    values = {**_kv_values(kv), "weights": manifest.weights_key, "config": manifest.config_hash}
    for name in ("max_model_len", "num_slots", "kv_memory_bytes", "page_bytes", "pretouch"):
        del values[name]
    values["bytes_per_token"] = kv.bytes_per_token
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())


def _depends_on_length(manifest: Manifest) -> bool:
    """Whether the KV of a token depends on the length of its prompt, so that others cannot share it."""
    rope: dict[str, Any] = manifest.model_config["rope"]
    return bool(rope["rope_type"] == "dynamic")
