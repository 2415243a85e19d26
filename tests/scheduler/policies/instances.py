"""Instances of plain data for tests of policies: a step takes 10 ms, and 0.1 ms for each of its tokens."""

from dataclasses import replace
from typing import Any

from xllm_compile.scheduler.cluster.state import (
    Instance,
    InstanceInfo,
    InstanceLoad,
    Placement,
    Pool,
    RequestShape,
    Role,
    StepProfile,
)

PROFILE = StepProfile(num_tokens=(1, 1001), seconds=(0.01, 0.11), sequence_s=1e-4, key_s=1e-6, pair_s=0.0)


def info(name: str, **values: Any) -> InstanceInfo:
    defaults: dict[str, Any] = {
        "incarnation": "1",
        "role": Role.MIX,
        "address": f"{name}:1",
        "weights_key": "w",
        "kv_layout": "k",
        "max_model_len": 32_768,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 1000,
        "kv_tokens_total": 100_000,
    }
    return InstanceInfo(name=name, **(defaults | values))


def instance(name: str, pool: Pool = Pool.MIX, **values: Any) -> Instance:
    """values: fields of Instance, of its load, or of its info."""
    own = {key: values.pop(key) for key in list(values) if key in Instance.__slots__}
    loads = {key: values.pop(key) for key in list(values) if key in InstanceLoad.__slots__}
    load = InstanceLoad(**({"profile": PROFILE} | loads))
    return replace(Instance(info=info(name, **values), pool=pool, load=load), **own)


def decoding(name: str, num_seqs: int, context: int = 500, pool: Pool = Pool.DECODE, **values: Any) -> Instance:
    """One that decodes so many sequences."""
    loads = {
        "num_running": num_seqs,
        "num_decoding": num_seqs,
        "num_context_tokens": num_seqs * context,
        "kv_tokens_used": num_seqs * context,
    }
    return instance(name, pool, **(loads | values))


def request(num_prompt_tokens: int = 1000, max_output_tokens: int = 256, **values: Any) -> RequestShape:
    return RequestShape(num_prompt_tokens=num_prompt_tokens, max_output_tokens=max_output_tokens, **values)


def placed(found: object) -> tuple[str, str]:
    assert isinstance(found, Placement), found
    return found.prefill, found.decode
