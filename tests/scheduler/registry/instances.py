"""Instances to register in tests."""

from typing import Any

from xllm_compile.scheduler.cluster.state import InstanceInfo, Role


def instance(name: str = "a", incarnation: str = "1", role: Role = Role.MIX, **values: Any) -> InstanceInfo:
    defaults = {
        "address": f"{name}:8001",
        "max_model_len": 128,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "kv_tokens_total": 1024,
    }
    return InstanceInfo(name=name, incarnation=incarnation, role=role, **{**defaults, **values})
