"""What of the machine's memory an instance takes: the size of its KV cache, its longest sequence, KV tiers.

All of it follows from the manifest, the configuration and what is free; nothing is allocated here but the tiers.
"""

import json
from dataclasses import asdict
from typing import Any

import torch
import xxhash

from xllm_compile.runtime.artifact import Manifest
from xllm_compile.runtime.instance_config import InstanceConfig
from xllm_compile.runtime.kv_cache_config import KVCacheConfig
from xllm_compile.runtime.memory.cpu_memory import HUGE_PAGE_BYTES
from xllm_compile.runtime.memory.kv_tiers import DiskTier, KVTiers
from xllm_compile.runtime.memory.remote_tier import RemoteTier
from xllm_compile.runtime.policies.state import Limits
from xllm_compile.runtime.resources import available_memory_bytes, total_memory_bytes

DEFAULT_KV_SHARE = 0.5
"""Of the free memory, what KV gets where no budget is given."""

_DEFAULT_NUM_SEQS = 64


def check_memory(**asked_bytes: int | None) -> None:
    """Raise ValueError where more is asked for, in all, than this process may have: it would be killed once that is
    used."""
    given = {name: value for name, value in asked_bytes.items() if value is not None}
    total = total_memory_bytes()
    if sum(given.values()) > total:
        parts = " and ".join(f"{name}={value}" for name, value in given.items())
        raise ValueError(f"{parts} are more than the {total} bytes of memory that there are; lower them")


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


def plan_kv_cache(manifest: Manifest, config: InstanceConfig, draft: Manifest | None) -> KVCacheConfig:
    """The KV cache of an instance that has the machine's free memory to itself, or its share as one of num_colocated.

    draft: the model that drafts for it, whose cache holds the same tokens and shares the budget.
    """
    model = manifest.model
    limit = check_model_len(manifest, config)
    token_bytes = model.kv_bytes_per_token + (draft.model.kv_bytes_per_token if draft else 0)
    shape = kv_shape(manifest, config)
    share = model.kv_bytes_per_token / token_bytes
    if config.kv_memory_bytes is not None:
        return KVCacheConfig(**shape, max_model_len=limit, kv_memory_bytes=int(config.kv_memory_bytes * share))
    # The ranks of an instance are taken to share one machine.
    free = available_memory_bytes() // (manifest.tensor_parallel_size * config.num_colocated)
    budget = min(full_kv_bytes(manifest, config), int(free * DEFAULT_KV_SHARE * share))
    if config.max_model_len is None:
        # Nobody asked for the full length: serve what fits rather than refuse to start.
        least = KVCacheConfig(**shape, max_model_len=1, kv_memory_bytes=budget)
        limit = min(limit, least.num_pages * least.page_tokens)
    return KVCacheConfig(**shape, max_model_len=limit, kv_memory_bytes=budget)


def full_kv_bytes(manifest: Manifest, config: InstanceConfig) -> int:
    """Room for as many sequences as run at once, all as long as they may get."""
    limit = config.max_model_len or manifest.model.max_model_len
    # A sequence's last page may be all but empty, and a page counts in whole tokens, which padding may make 15 of 16.
    sequence_bytes = limit * manifest.model.kv_bytes_per_token * 9 // 8 + HUGE_PAGE_BYTES
    return step_limits(manifest, config).max_num_seqs * sequence_bytes


def open_kv_tiers(manifest: Manifest, config: InstanceConfig, kv: KVCacheConfig) -> KVTiers | None:
    """Where KV goes that lost its pages; None without host memory for it. Raises ValueError where it cannot be kept."""
    if config.kv_host_bytes is None:
        return None
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


def kv_values(config: KVCacheConfig) -> dict[str, Any]:
    """The cache's shape as JSON has it."""
    return {**asdict(config), "dtype": str(config.dtype).removeprefix("torch.")}


def _block_layout(manifest: Manifest, kv: KVCacheConfig) -> str:
    """Names all that the content of a block depends on beside its tokens."""
    values = {**kv_values(kv), "weights": manifest.weights_key, "config": manifest.config_hash}
    for name in ("max_model_len", "num_slots", "kv_memory_bytes", "page_bytes", "pretouch"):
        del values[name]
    values["bytes_per_token"] = kv.bytes_per_token
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())


def _depends_on_length(manifest: Manifest) -> bool:
    """Whether the KV of a token depends on the length of its prompt, so that others cannot share it."""
    rope: dict[str, Any] = manifest.model_config["rope"]
    return bool(rope["rope_type"] == "dynamic")
