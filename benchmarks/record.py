"""The form of every recorded measurement: one JSON file per claim under benchmarks/results/.

A **bar** is a figure with the limit it was promised against: "<= 180", "> 1". Whether it is met is computed, never
written by hand. Records are read back by ``xllm-bench check`` and by the documents that quote them.
"""

import json
import math
import operator
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
}
_PACKAGES = ("xllm-compile", "torch", "transformers", "numpy", "tokenizers", "safetensors")


class RecordError(ValueError):
    """A record that does not have the form; the message names file and field."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """One figure against its limit. ``bar`` is an operator and a number in ``unit``; "" is a figure without one."""

    what: str
    value: float
    unit: str
    bar: str = ""

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise RecordError(f"bar {self.what!r}: value is {self.value}, a finite number is needed")
        if self.bar:
            _parse_bar(self.bar)

    @property
    def met(self) -> bool | None:
        """None where there is nothing to meet."""
        if not self.bar:
            return None
        compare, limit = _parse_bar(self.bar)
        return compare(self.value, limit)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Bar":
        bar = cls(**{key: values[key] for key in ("what", "value", "unit", "bar")})
        if values["met"] is not bar.met:
            raise RecordError(f"bar {bar.what!r}: met is {values['met']}, but {bar.value} {bar.bar} is {bar.met}")
        return bar


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    name: str
    """File name below benchmarks/results/, without .json."""
    command: Sequence[str]
    created: str
    commit: Mapping[str, Any]
    """hash, and is_dirty: whether a tracked file differed from it."""
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    seed: int
    raw: Mapping[str, Any]
    """Everything the bars were computed from, and what else was measured."""
    bars: Sequence[Bar] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        if not self.name or Path(self.name).name != self.name:
            raise RecordError(f"name {self.name!r} must be a plain file name")
        duplicates = {bar.what for bar in self.bars if sum(other.what == bar.what for other in self.bars) > 1}
        if duplicates:
            raise RecordError(f"{self.name}: two bars are called {min(duplicates)!r}")

    def to_json(self) -> dict[str, Any]:
        return {**{key: getattr(self, key) for key in self.__slots__}, "bars": [bar.to_json() for bar in self.bars]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Record":
        expected, given = set(cls.__slots__), set(values)
        if expected != given:
            raise RecordError(f"fields missing: {sorted(expected - given)}; unknown: {sorted(given - expected)}")
        return cls(**{**values, "bars": tuple(Bar.from_json(bar) for bar in values["bars"])})

    def write(self, folder: Path = RESULTS) -> Path:
        """Write NAME.json, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path


def make_record(
    name: str, command: Sequence[str], *, seed: int, raw: Mapping[str, Any], bars: Sequence[Bar] = ()
) -> Record:
    """A record of a measurement made now, by this checkout, on this machine."""
    return Record(
        name=name,
        command=list(command),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=git_commit(Path(__file__).resolve().parent),
        machine=machine(),
        versions=versions(),
        seed=seed,
        raw=raw,
        bars=bars,
    )


def read_record(path: Path) -> Record:
    """Raises RecordError naming the file."""
    try:
        return Record.from_json(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise RecordError(f"{path} is no benchmark record ({err}); run its benchmark again or delete it") from err


def read_records(folder: Path = RESULTS) -> list[Record]:
    """Every record in the folder, by name."""
    return [read_record(path) for path in sorted(folder.glob("*.json"))]


def _parse_bar(text: str) -> tuple[Callable[[float, float], bool], float]:
    sign, _, number = text.partition(" ")
    try:
        return _COMPARE[sign], float(number)
    except (KeyError, ValueError):
        raise RecordError(f"bar {text!r} must be one of {', '.join(_COMPARE)}, a space and a number") from None


def git_commit(folder: Path) -> dict[str, Any]:
    """hash and is_dirty of the checkout; both None outside of one. Recorded results do not make it dirty."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results")
        return {"hash": git("rev-parse", "HEAD"), "is_dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"hash": None, "is_dirty": None}


def machine() -> dict[str, Any]:
    """CPU model, cores and memory of this machine."""
    cpuinfo = Path("/proc/cpuinfo").read_text(errors="replace")
    values = dict(line.split(":", 1) for line in cpuinfo.split("\n\n")[0].splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in values.items()}
    flags = facts.get("flags", "").split()
    return {
        "cpu": facts.get("model name", "unknown"),
        "cpu_family_model": f"{facts.get('cpu family', '?')}/{facts.get('model', '?')}",
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "features": [flag for flag in flags if flag.startswith(("avx512_", "avx2", "amx"))],
        "kernel": os.uname().release,
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that can change a figure."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
