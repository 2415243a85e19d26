"""What a device can do, as data: cores, peak rates, memory, link, launch cost, and what share of it kernels reach.

The files in ``devices/`` describe devices we know; ``xllm-bench calibrate`` writes one for the present machine.
Plain arithmetic over plain data: the runtime may import this.
"""

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

Unit = Literal["cube", "vector", "communication", "copy"]
UNITS: tuple[Unit, ...] = ("cube", "vector", "communication", "copy")
FAMILIES = ("linear", "attention", "token_wise", "gather", "collective", "copy")
DEVICES = Path(__file__).parent / "devices"


class DeviceSpecError(ValueError):
    """A device spec that cannot be used; names file, field and value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Efficiency:
    """What one family of operators makes of the device.

    A product of M rows takes flops_per_row * (M rounded up to ``row_tile`` + ``half_rows``) at ``compute`` of the peak:
    M = half_rows reaches half of the asymptote.
    """

    compute: float = 1.0
    """Asymptote: share of the peak with many rows."""
    memory: float = 1.0
    """Share of the bandwidth."""
    half_rows: float = 0.0
    row_tile: int = 1
    tile_rows: int = 0
    """A core computes outputs of a product in tiles of this many rows ..."""
    tile_columns: int = 0
    """... and columns; 0: work divides evenly among cores."""
    overlap: float = 1.0
    """1: computing hides moving, or the reverse; 0: one after the other."""

    def __post_init__(self) -> None:
        for name in ("compute", "memory"):
            if not 0 < getattr(self, name) <= 4:
                raise DeviceSpecError(f"efficiency {name}={getattr(self, name)} must be in (0, 4]")
        if self.half_rows < 0 or self.row_tile < 1 or not 0 <= self.overlap <= 1:
            raise DeviceSpecError(f"{self} needs half_rows >= 0, row_tile >= 1 and overlap in [0, 1]")
        if min(self.tile_rows, self.tile_columns) < 0 or bool(self.tile_rows) != bool(self.tile_columns):
            raise DeviceSpecError(f"{self} needs tile_rows and tile_columns both, or neither")


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceSpec:
    name: str
    sources: Mapping[str, str]
    """Where each figure comes from, by field."""
    cores: Mapping[str, int]
    """Of cube and vector."""
    core_flops: Mapping[str, Mapping[str, float]]
    """Peak of one core, by unit and dtype; a multiply-add is two."""
    memory_bytes_per_s: float
    cache_bytes: int
    """Last-level cache: results up to this size are read back from it."""
    cache_bytes_per_s: float
    link_bytes_per_s: float
    """To other devices, one direction."""
    link_latency_s: float
    """Of one message."""
    launch_s: float
    """Start of one operator inside a compiled graph."""
    step_overhead_s: float = 0.0
    """Once a step: the host's work between steps."""
    dynamic_overhead: float = 1.1
    """Time of the dynamic-shape graph over that of a graph for the very size."""
    efficiency: Mapping[str, Efficiency] = field(default_factory=dict)
    """By family of operators; a family left out reaches the peak."""
    core_bytes_per_s: float | None = None
    """Most that one core reads; None: any one can have the whole bandwidth."""
    most_bytes_per_s: float | None = None
    """Bandwidth that more cores do not raise; None: each core brings its own."""

    def __post_init__(self) -> None:
        for name in ("memory_bytes_per_s", "cache_bytes", "cache_bytes_per_s", "link_bytes_per_s"):
            if not _is_positive(getattr(self, name)):
                raise DeviceSpecError(f"device spec {self.name}: {name}={getattr(self, name)!r} must be above 0")
        for name in ("core_bytes_per_s", "most_bytes_per_s"):
            if getattr(self, name) is not None and not _is_positive(getattr(self, name)):
                raise DeviceSpecError(
                    f"device spec {self.name}: {name}={getattr(self, name)!r} must be above 0, or null"
                )
        for name, least in (("link_latency_s", 0), ("launch_s", 0), ("step_overhead_s", 0), ("dynamic_overhead", 1)):
            value = getattr(self, name)
            if not (value == 0 == least or (_is_positive(value) and value >= least)):
                raise DeviceSpecError(f"device spec {self.name}: {name}={value!r} must be finite and at least {least}")
        for unit in ("cube", "vector"):
            cores, rates = self.cores.get(unit, 0), self.core_flops.get(unit, {})
            if not isinstance(cores, int) or cores < 1 or not rates or not all(map(_is_positive, rates.values())):
                raise DeviceSpecError(
                    f"device spec {self.name}: {unit} needs a number of cores, at least one, and peak rates above 0,"
                    f" not {cores!r} and {dict(rates)}"
                )
        unknown = sorted({*self.efficiency} - {*FAMILIES})
        if unknown:
            raise DeviceSpecError(
                f"device spec {self.name}: efficiency of {unknown[0]!r}; families: {', '.join(FAMILIES)}"
            )

    def peak_flops(self, unit: str, dtype: str) -> float:
        """Of all cores. A dtype without a rate of its own computes as the widest one listed, int8 as bfloat16."""
        rates = self.core_flops[unit]
        if dtype == "int8" and dtype not in rates:
            dtype = "bfloat16"
        return self.cores[unit] * rates.get(dtype, min(rates.values()))

    def with_cores(self, num_cores: int) -> "DeviceSpec":
        """The same machine with another number of cores for either unit; memory bandwidth scales along, to its most."""
        scale = num_cores / self.cores["cube"]
        most = math.inf if self.most_bytes_per_s is None else self.most_bytes_per_s
        return replace(
            self,
            cores=dict.fromkeys(("cube", "vector"), num_cores),
            memory_bytes_per_s=min(self.memory_bytes_per_s * scale, most),
            cache_bytes_per_s=self.cache_bytes_per_s * scale,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "DeviceSpec":
        """Raises DeviceSpecError on a missing or unknown field or a value out of range."""
        known = {entry.name for entry in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise DeviceSpecError(f"unknown field {unknown[0]!r}; fields: {', '.join(sorted(known))}")
        needed = {entry.name for entry in fields(cls) if entry.default is MISSING and entry.default_factory is MISSING}
        missing = sorted(needed - set(values))
        if missing:
            raise DeviceSpecError(f"{missing[0]!r} is missing; xllm-bench calibrate writes whole ones")
        try:
            efficiency = {name: Efficiency(**entry) for name, entry in values.get("efficiency", {}).items()}
            return cls(**{**values, "efficiency": efficiency})
        except (TypeError, AttributeError) as err:
            raise DeviceSpecError(" ".join(str(err).split())) from err


def _is_positive(value: object) -> bool:
    """Whether it is a finite number above 0."""
    return isinstance(value, (int, float)) and 0 < value < math.inf


def read_device_spec(path: Path) -> DeviceSpec:
    """Raises DeviceSpecError naming the file."""
    try:
        values = json.loads(path.read_text())
    except OSError as err:
        raise DeviceSpecError(f"device spec {path}: {err.strerror}; names that are built in: {device_names()}") from err
    except ValueError as err:
        raise DeviceSpecError(f"device spec {path} is no JSON ({err}); run xllm-bench calibrate to write one") from err
    if not isinstance(values, dict):
        raise DeviceSpecError(f"device spec {path} must be a JSON object")
    try:
        return DeviceSpec.from_json(values)
    except DeviceSpecError as err:
        raise DeviceSpecError(f"device spec {path}: {err}") from err


def device_names() -> str:
    return ", ".join(sorted(path.stem for path in DEVICES.glob("*.json")))


def device_spec(name: str) -> DeviceSpec:
    """A device we know by its name. Raises DeviceSpecError listing the names."""
    path = DEVICES / f"{name}.json"
    if Path(name).name != name or not path.is_file():
        raise DeviceSpecError(f"no device is named {name!r}; devices: {device_names()}")
    return read_device_spec(path)


def cpu_device_spec(features: Sequence[str], num_cores: int) -> DeviceSpec:
    """What a CPU with these features can be expected to do, uncalibrated."""
    if "amx_bf16" in features and "amx_tile" in features:
        name = "cpu-amx"
    elif "avx512_bf16" in features:
        name = "cpu-avx512"
    else:
        name = "cpu-avx2"
    return device_spec(name).with_cores(num_cores)


def write_device_spec(path: Path, spec: DeviceSpec) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(spec.to_json(), file, indent=1)
            file.write("\n")
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
