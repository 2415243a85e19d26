"""Several artifacts in one process, whose weights and KV share one budget of memory.

All is planned from the manifests before anything is opened: how long a sequence of each model may be, and whether the
models fit side by side. What does not fit starts asleep where that is allowed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xllm_compile.runtime.artifact import Manifest, read_manifest
from xllm_compile.runtime.instance import Instance, SharedMemory, open_instance
from xllm_compile.runtime.instance_config import InstanceConfig
from xllm_compile.runtime.instance_memory import (
    DEFAULT_KV_SHARE,
    check_memory,
    check_model_len,
    full_kv_bytes,
    kv_shape,
)
from xllm_compile.runtime.kv_cache_config import KVCacheConfig
from xllm_compile.runtime.memory.cpu_memory import HUGE_PAGE_BYTES, CpuMemory
from xllm_compile.runtime.memory.shared_pages import SharedPages
from xllm_compile.runtime.resources import available_memory_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPlan:
    """One model's part."""

    root: Path
    kv: KVCacheConfig
    """As if it had all of the memory."""
    num_weight_pages: int

    @property
    def num_pages(self) -> int:
        """What it needs to be awake: weights, and one sequence of full length."""
        return self.num_weight_pages + self.kv.pages_per_slot


def open_models(
    artifacts: Mapping[str, Path], config: InstanceConfig, memory_bytes: int | None = None, *, may_sleep: bool = False
) -> dict[str, Instance]:
    """Open the artifact of each name. memory_bytes is for the weights and KV of all; None takes half of what is free.

    may_sleep: models that do not fit beside those before them start asleep. Raises what open_instance raises, and
    ValueError, before anything is opened, for what the budget does not hold.
    """
    check_memory(memory_bytes=memory_bytes, kv_host_bytes=config.kv_host_bytes, kv_swap_bytes=config.kv_swap_bytes)
    plans = plan_models(artifacts, config, memory_bytes, may_sleep=may_sleep)
    num_pages = next(iter(plans.values())).kv.num_pages
    memory = CpuMemory(num_pages, HUGE_PAGE_BYTES)
    # The limit is the process's, and each model keeps to it by itself.
    memory.max_mappings //= len(plans)
    pages = SharedPages(memory)
    config = replace(
        config,
        kv_host_bytes=config.kv_host_bytes and config.kv_host_bytes // len(plans),
        kv_swap_bytes=config.kv_swap_bytes and config.kv_swap_bytes // len(plans),
        kv_disk_bytes=config.kv_disk_bytes // len(plans),
    )
    instances: dict[str, Instance] = {}
    for name, plan in plans.items():
        share = pages.share(name, num_weight_pages=plan.num_weight_pages, min_kv_pages=plan.kv.pages_per_slot)
        shared = SharedMemory(share=share, kv=plan.kv, starts_asleep=plan.num_pages > pages.num_free)
        instances[name] = open_instance(plan.root, config, shared=shared)
    return instances


def plan_models(
    artifacts: Mapping[str, Path], config: InstanceConfig, memory_bytes: int | None, *, may_sleep: bool
) -> dict[str, ModelPlan]:
    """Reads the manifests only. Raises ValueError, ArtifactMismatchError."""
    _check_config(config)
    manifests = {name: read_manifest(root) for name, root in artifacts.items()}
    weights = {name: -(-manifest.weights[0].num_bytes // HUGE_PAGE_BYTES) for name, manifest in manifests.items()}
    for name, manifest in manifests.items():
        if manifest.tensor_parallel_size > 1:
            raise ValueError(
                f"model {name!r} is compiled for {manifest.tensor_parallel_size} ranks and shares its process with no"
                " other; serve it alone"
            )
    if memory_bytes is None:
        memory_bytes = _default_bytes(manifests, config, sum(weights.values()) * HUGE_PAGE_BYTES)
    num_pages = memory_bytes // HUGE_PAGE_BYTES
    spare = (num_pages - sum(weights.values())) // len(manifests)
    if not may_sleep:
        _check_together({name: count + 1 for name, count in weights.items()}, num_pages)
    plans: dict[str, ModelPlan] = {}
    for name, manifest in manifests.items():
        # Those that take turns may each have all that its weights leave.
        most = spare if spare > 0 else num_pages - weights[name]
        kv = _kv_config(name, manifest, config, num_pages, most, weights[name])
        plans[name] = ModelPlan(root=artifacts[name], kv=kv, num_weight_pages=weights[name])
    if not may_sleep:
        _check_together({name: plan.num_pages for name, plan in plans.items()}, num_pages)
    return plans


def _check_together(needed: Mapping[str, int], num_pages: int) -> None:
    """Raises ValueError where the pages that the models need are more than there are."""
    if sum(needed.values()) > num_pages:
        parts = ", ".join(f"{name!r} {_mib(count)} MiB" for name, count in needed.items())
        raise ValueError(
            f"the models need {_mib(sum(needed.values()))} MiB to be served together, memory is {_mib(num_pages)} MiB:"
            f" {parts}, each for its weights and one sequence. Raise the memory, lower max_model_len, or have them wake"
            " up on request"
        )


def _check_config(config: InstanceConfig) -> None:
    for name, value, why in (
        ("kv_memory_bytes", config.kv_memory_bytes, "models share their memory; give memory for all of it"),
        ("kv_pretouch", config.kv_pretouch or None, "which pages are for KV changes as models sleep and wake"),
        (
            "speculative.draft_model",
            config.speculative and config.speculative.draft_model,
            "one draft model does not fit several models; leave it out",
        ),
    ):
        if value is not None:
            raise ValueError(f"{name}={value} cannot be combined with several artifacts: {why}")


def _default_bytes(manifests: Mapping[str, Manifest], config: InstanceConfig, weights_bytes: int) -> int:
    wanted = sum(full_kv_bytes(manifest, config) for manifest in manifests.values())
    free = available_memory_bytes()
    if weights_bytes > free:
        return int(free * DEFAULT_KV_SHARE)
    return weights_bytes + min(wanted, int((free - weights_bytes) * DEFAULT_KV_SHARE))


def _kv_config(
    name: str, manifest: Manifest, config: InstanceConfig, num_pages: int, spare: int, num_weight_pages: int
) -> KVCacheConfig:
    """``spare`` pages are for one sequence of full length, where nobody asked for a length."""
    limit = check_model_len(manifest, config)
    if num_pages <= num_weight_pages:
        raise ValueError(
            f"model {name!r} needs {_mib(num_weight_pages)} MiB for its weights and some for KV; memory is"
            f" {_mib(num_pages)} MiB: raise it"
        )
    shape: dict[str, Any] = kv_shape(manifest, config)
    shape |= {"kv_memory_bytes": num_pages * HUGE_PAGE_BYTES, "page_bytes": HUGE_PAGE_BYTES}
    if config.max_model_len is None:
        limit = min(limit, max(spare, 1) * KVCacheConfig(**shape, max_model_len=1).page_tokens)
    kv = KVCacheConfig(**shape, max_model_len=limit)
    if num_weight_pages + kv.pages_per_slot > num_pages:
        raise ValueError(
            f"model {name!r} needs {_mib(num_weight_pages)} MiB for its weights and {_mib(kv.pages_per_slot)} MiB for"
            f" one sequence of max_model_len={limit}; memory is {_mib(num_pages)} MiB: raise it or lower max_model_len"
        )
    return kv


def _mib(num_pages: int) -> int:
    return num_pages * HUGE_PAGE_BYTES >> 20
