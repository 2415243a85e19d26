"""An InstanceInfo as the JSON that the registry holds."""

import dataclasses
import json
import typing
from typing import Any

from xllm_compile.scheduler.cluster.state import InstanceInfo, Role

PREFIX = "/xllm/instances/"
"""Of the keys; a namespace of the user's may come before it."""


def to_json(info: InstanceInfo) -> bytes:
    return json.dumps(dataclasses.asdict(info), separators=(",", ":")).encode()


def from_json(data: bytes) -> InstanceInfo:
    """Unknown keys are another version's and left out. Raises ValueError naming the field, what it is and must be."""
    try:
        values = json.loads(data)
    except ValueError as err:
        raise ValueError(f"no JSON: {err}") from err
    if not isinstance(values, dict):
        raise ValueError(f"a JSON object is needed, not {type(values).__name__}")
    types = typing.get_type_hints(InstanceInfo)
    read: dict[str, Any] = {}
    for field in dataclasses.fields(InstanceInfo):
        if field.name in values:
            read[field.name] = _value(field.name, types[field.name], values[field.name])
        elif field.default is dataclasses.MISSING:
            raise ValueError(f"{field.name} is missing")
    for name in ("name", "incarnation", "address"):
        if not read[name]:
            raise ValueError(f"{name} must not be empty")
    return InstanceInfo(**read)


def _value(name: str, wanted: Any, value: Any) -> Any:
    if wanted is Role:
        try:
            return Role(value)
        except ValueError:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(Role)}") from None
    if wanted is int:
        if type(value) is not int or value < 0:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 0")
        return value
    if wanted is str:
        if not isinstance(value, str):
            raise ValueError(f"{name}={value!r} must be a string")
        return value
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{name}={value!r} must be a list of strings")
    return tuple(value)
