"""Where a step's time goes: every kernel call of the compiled graphs, timed in place.

A small library with the kernels' own entry points is loaded in front of them: graphs find its functions first, which
note the time and call the real ones. What lies between two kernel calls is the graphs' wrapper code and the host.
"""

import ctypes
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xllm_compile.runtime.ops import SCHEMAS

_MAX_EVENTS = 1 << 20
_C_TYPES = {"Tensor": "void*", "Tensor?": "void**", "int": "int64_t", "float": "double", "bool": "int32_t"}

_PRELUDE = f"""
#include <dlfcn.h>
#include <stdint.h>
#include <time.h>
typedef struct {{ int32_t op, pad; int64_t rows, columns, out_features, weight_bytes; double begin, end; }} Event;
static Event events[{_MAX_EVENTS}];
static int64_t count;
static void* kernels;
extern "C" int32_t aoti_torch_get_sizes(void*, int64_t**);
extern "C" int32_t aoti_torch_get_dim(void*, int64_t*);
extern "C" int32_t aoti_torch_get_numel(void*, int64_t*);
extern "C" int32_t aoti_torch_get_dtype(void*, int32_t*);
extern "C" size_t aoti_torch_dtype_element_size(int32_t);
static double now() {{ timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec * 1e-9; }}
static int64_t bytes_of(void* tensor) {{
  int64_t numel;
  int32_t dtype;
  aoti_torch_get_numel(tensor, &numel);
  aoti_torch_get_dtype(tensor, &dtype);
  return numel * aoti_torch_dtype_element_size(dtype);
}}
static Event* open_event(int32_t op, void* tensor, int64_t out_features, int64_t weight_bytes) {{
  if (count == {_MAX_EVENTS}) return nullptr;
  int64_t *sizes, dim;
  Event* event = &events[count++];
  aoti_torch_get_sizes(tensor, &sizes);
  aoti_torch_get_dim(tensor, &dim);
  *event = Event{{op, 0, sizes[0], dim > 1 ? sizes[dim - 1] : 1, out_features, weight_bytes, now(), 0}};
  return event;
}}
extern "C" int xllm_profile_open(const char* path) {{ return (kernels = dlopen(path, RTLD_NOW)) != nullptr; }}
extern "C" void xllm_profile_clear() {{ count = 0; }}
extern "C" int64_t xllm_profile_count() {{ return count; }}
extern "C" const Event* xllm_profile_events() {{ return events; }}
"""


class _Event(ctypes.Structure):
    _fields_ = [
        ("op", ctypes.c_int32),
        ("pad", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("weight_bytes", ctypes.c_int64),
        ("begin", ctypes.c_double),
        ("end", ctypes.c_double),
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelCall:
    """One call; times on the clock of time.monotonic()."""

    op: str
    rows: int
    """Of its first tensor."""
    columns: int
    out_features: int
    """Of a linear; 0 for the others."""
    weight_bytes: int
    """Of a linear's weight as it lies in memory, scales and zero points included; 0 for the others."""
    begin_s: float
    end_s: float

    @property
    def label(self) -> str:
        return f"{self.op} {self.columns} -> {self.out_features}" if self.out_features else self.op

    @property
    def seconds(self) -> float:
        return self.end_s - self.begin_s


class KernelProfiler:
    """Must exist before the artifact's kernels are loaded, and once per process at most."""

    def __init__(self, kernels: Path, work_dir: Path) -> None:
        """Builds the library below ``work_dir``; ``kernels`` is the artifact's. Needs a C++ compiler."""
        folder = work_dir / "profile"
        folder.mkdir(parents=True, exist_ok=True)
        source, library = folder / "profile.cpp", folder / "profile.so"
        source.write_text(_source())
        compiler = os.environ.get("CXX", "g++").split()
        torch_library = f"-L{Path(torch.__file__).parent / 'lib'}"
        options = ["-O2", "-fPIC", "-shared", str(source), torch_library, "-ltorch_cpu", "-o", str(library)]
        subprocess.run([*compiler, *options], check=True)
        self._library: Any = ctypes.CDLL(str(library), mode=os.RTLD_NOW | os.RTLD_GLOBAL)
        self._library.xllm_profile_count.restype = ctypes.c_int64
        self._library.xllm_profile_events.restype = ctypes.POINTER(_Event)
        if not self._library.xllm_profile_open(str(kernels).encode()):
            raise OSError(f"cannot load {kernels}; build the artifact again with xllm-compile")

    def clear(self) -> None:
        self._library.xllm_profile_clear()

    def calls(self) -> list[KernelCall]:
        """Since the last clear(). Raises RuntimeError when there were too many to keep."""
        count = self._library.xllm_profile_count()
        if count == _MAX_EVENTS:
            raise RuntimeError(f"more than {_MAX_EVENTS} kernel calls; profile fewer steps")
        names = _profiled()
        events = self._library.xllm_profile_events()[:count] if count else []
        return [
            KernelCall(
                op=names[event.op],
                rows=event.rows,
                columns=event.columns,
                out_features=event.out_features,
                weight_bytes=event.weight_bytes,
                begin_s=event.begin,
                end_s=event.end,
            )
            for event in events
        ]


def _profiled() -> list[str]:
    return list(SCHEMAS)


def _source() -> str:
    return _PRELUDE + "\n".join(_wrapper(index, name) for index, name in enumerate(_profiled()))


def _wrapper(index: int, name: str) -> str:
    parameters, num_results = parse_schema(SCHEMAS[name])
    typed = [f"{_C_TYPES[kind]} {argument}" for kind, argument in parameters]
    results = [f"void** ret{result}" for result in range(num_results)]
    names = [argument for _, argument in parameters] + [f"ret{result}" for result in range(num_results)]
    first, *others = (argument for kind, argument in parameters if kind == "Tensor")
    is_linear = "out_features" in names
    weight_bytes = " + ".join(f"bytes_of({argument})" for argument in others)
    opened = f"{index}, {first}, " + (f"out_features, {weight_bytes}" if is_linear else "0, 0")
    symbol = f"aoti_torch_cpu_{name}"
    return f"""
extern "C" int32_t {symbol}({", ".join(typed + results)}) {{
  static const auto real = (decltype(&{symbol}))dlsym(kernels, "{symbol}");
  Event* event = open_event({opened});
  const int32_t code = real({", ".join(names)});
  if (event) event->end = now();
  return code;
}}"""


def parse_schema(schema: str) -> tuple[list[tuple[str, str]], int]:
    """((type, name) of each argument, number of results) of an operator's schema; aliasing marks are dropped."""
    arguments, _, results = schema.partition("->")
    inside = arguments.strip()[1:-1].replace("Tensor(a!)", "Tensor")
    parameters = [(kind, name) for kind, name in (part.split() for part in inside.split(","))]
    return parameters, results.count("Tensor")


def group_calls(calls: Sequence[KernelCall]) -> dict[str, list[KernelCall]]:
    """By label, in the order of first appearance."""
    groups: dict[str, list[KernelCall]] = {}
    for call in calls:
        groups.setdefault(call.label, []).append(call)
    return groups
