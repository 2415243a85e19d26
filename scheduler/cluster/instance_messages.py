"""Between state.py and the messages in which instances describe themselves (proto/xllm.proto)."""

from dataclasses import asdict, fields
from typing import Any

from xllm_compile.scheduler.cluster.state import InstanceCounters, InstanceInfo, InstanceLoad, Role, StepProfile
from xllm_compile.scheduler.proto import xllm_pb2

_OPTIONAL_LOAD = ("ttft_s", "tpot_s")


def info_message(info: InstanceInfo, *, is_ready: bool) -> Any:
    values = {field.name: getattr(info, field.name) for field in fields(info)}
    return xllm_pb2.InstanceInfo(**values | {"role": info.role.value}, is_ready=is_ready)


def info_of(message: Any) -> InstanceInfo:
    """Raises ValueError on a role that this version does not know."""
    values = {field.name: getattr(message, field.name) for field in fields(InstanceInfo)}
    values |= {
        "role": Role(message.role),
        "transfers": tuple(message.transfers),
        "model_names": tuple(message.model_names),
    }
    return InstanceInfo(**values)


def load_message(load: InstanceLoad, *, incarnation: str) -> Any:
    values = {field.name: getattr(load, field.name) for field in fields(load)}
    profile, counters = values.pop("profile"), asdict(values.pop("counters"))
    message = xllm_pb2.InstanceLoad(**values, incarnation=incarnation, counters=xllm_pb2.InstanceCounters(**counters))
    if profile is not None:
        message.profile.CopyFrom(xllm_pb2.StepProfile(**asdict(profile)))
    return message


def load_of(message: Any) -> InstanceLoad:
    values = {field.name: getattr(message, field.name) for field in fields(InstanceLoad)}
    values |= {name: getattr(message, name) if message.HasField(name) else None for name in _OPTIONAL_LOAD}
    values["profile"] = _profile(message.profile) if message.HasField("profile") else None
    counters = {field.name: getattr(message.counters, field.name) for field in fields(InstanceCounters)}
    values["counters"] = InstanceCounters(**counters)
    return InstanceLoad(**values)


def _profile(message: Any) -> StepProfile:
    return StepProfile(
        num_tokens=tuple(message.num_tokens),
        seconds=tuple(message.seconds),
        sequence_s=message.sequence_s,
        key_s=message.key_s,
        pair_s=message.pair_s,
    )
