"""Which device spec a build predicts with: the one given, the one calibrated on this machine, or the built-in one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from xllm_compile.graph_passes.device_spec import DeviceSpec, cpu_device_spec, device_spec, read_device_spec
from xllm_compile.machine import cache_dir, cpu_model
from xllm_compile.runtime.isa import isa_features
from xllm_compile.runtime.resources import num_cpus

_BUILT_IN = {"npu": "ascend-910b2", "cuda": "h200"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenDevice:
    spec: DeviceSpec
    origin: str
    """given, calibrated or built in."""

    def to_json(self) -> dict[str, Any]:
        return {"origin": self.origin, **self.spec.to_json()}


def choose_device(target: str, given: Path | None) -> ChosenDevice:
    """Raises DeviceSpecError when the given or the calibrated spec cannot be read."""
    if given is not None:
        spec = read_device_spec(given) if given.suffix == ".json" else device_spec(str(given))
        return ChosenDevice(spec=spec, origin="given")
    if target in _BUILT_IN:
        return ChosenDevice(spec=device_spec(_BUILT_IN[target]), origin="built in")
    calibrated = calibrated_path()
    if calibrated.is_file():
        return ChosenDevice(spec=read_device_spec(calibrated), origin="calibrated")
    return ChosenDevice(spec=cpu_device_spec(isa_features(), num_cpus()), origin="built in")


def calibrated_path() -> Path:
    """Where ``xllm-bench calibrate`` keeps the spec of this machine: by CPU model, features and number of CPUs."""
    machine = "\0".join((cpu_model(), *isa_features(), str(num_cpus())))
    return cache_dir() / "devices" / f"cpu-{xxhash.xxh3_64(machine.encode()).hexdigest()}.json"
