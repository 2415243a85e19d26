"""The CPU kernels of the operators: build for a set of CPU features, load, register with torch.

The C++ sources in ``cpu/`` export one function per operator in the AOTInductor C shim ABI
(``aoti_torch_cpu_<operator>``). Graphs compiled by AOTInductor call them directly; ``load_kernels`` makes the same
functions answer ``torch.ops.xllm.*`` for CPU tensors.
"""

import ctypes
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from xllm_compile.runtime.ops import LIBRARY, SCHEMAS

logger = logging.getLogger(__name__)

SOURCE_FOLDER = Path(__file__).parent / "cpu"

# /proc/cpuinfo name of each feature the kernels use -> compiler flag. The sources choose among three instruction
# sets by what is there: AVX-512 (all four), AVX2 with FMA, anything else; bfloat16 products use AMX tiles if they can,
# int8 ones VNNI.
FEATURE_FLAGS: dict[str, str] = {
    "avx2": "-mavx2",
    "fma": "-mfma",
    "avx512f": "-mavx512f",
    "avx512bw": "-mavx512bw",
    "avx512dq": "-mavx512dq",
    "avx512vl": "-mavx512vl",
    "avx512_bf16": "-mavx512bf16",
    "avx512_vnni": "-mavx512vnni",
    "avx512vbmi": "-mavx512vbmi",
    "amx_tile": "-mamx-tile",
    "amx_bf16": "-mamx-bf16",
}

# Denormals, NaN and the order of sums stay as written: no -ffast-math.
COMPILE_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-pthread",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
)


class CompilerNotFoundError(RuntimeError):
    """No C++ compiler to build the kernels with."""


class KernelBuildError(RuntimeError):
    """The compiler refused the kernel sources; the message ends with its last lines."""


class KernelLoadError(RuntimeError):
    """The kernel library cannot be loaded into this process."""


class KernelError(ValueError):
    """A kernel refused its arguments; the message names operator, value and limit."""


def cpu_features() -> tuple[str, ...]:
    """Features of this CPU that the kernels make use of, in a fixed order; empty where none is known."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    present = next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set[str]())
    return tuple(name for name in FEATURE_FLAGS if name in present)


def build_flags(features: Sequence[str] | None = None) -> tuple[str, ...]:
    """Compiler flags for a set of features (this machine's by default). Raises ValueError on an unknown feature."""
    names = cpu_features() if features is None else features
    unknown = [name for name in names if name not in FEATURE_FLAGS]
    if unknown:
        raise ValueError(f"unknown CPU features {unknown}; known are {list(FEATURE_FLAGS)}")
    return (*COMPILE_FLAGS, *(FEATURE_FLAGS[name] for name in FEATURE_FLAGS if name in names))


def _sources() -> list[Path]:
    return sorted(SOURCE_FOLDER.glob("*.cpp"))


def kernel_source_hash(features: Sequence[str] | None = None) -> str:
    """Hash of sources and flags: equal hashes mean equal kernels. Content only, no paths."""
    digest = hashlib.sha256("\0".join(build_flags(features)).encode())
    for source in sorted([*_sources(), *SOURCE_FOLDER.glob("*.h")]):
        digest.update(f"\0{source.name}\0".encode() + source.read_bytes())
    return digest.hexdigest()


def _run_compiler(arguments: Sequence[str]) -> None:
    compiler = os.environ.get("CXX", "g++")
    try:
        done = subprocess.run([*compiler.split(), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as err:
        raise CompilerNotFoundError(f"C++ compiler {compiler!r} not found; install g++ or set CXX") from err
    if done.returncode != 0:
        tail = "\n".join(done.stderr.strip().splitlines()[-20:])
        raise KernelBuildError(f"{compiler} failed with status {done.returncode}:\n{tail}")


def build_kernels(output: Path, features: Sequence[str] | None = None, source_folder: Path = SOURCE_FOLDER) -> None:
    """Compiles the kernels for `features` (this machine's by default) into one shared library at `output`.

    The file appears complete or not at all. Raises CompilerNotFoundError or KernelBuildError.
    """
    flags = build_flags(features)
    torch_folder = Path(torch.__file__).parent
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".kernels-", dir=output.parent) as folder:

        def compile_source(source: Path) -> str:
            target = Path(folder) / f"{source.stem}.o"
            include = f"-I{torch_folder / 'include'}"
            _run_compiler([*flags, include, "-c", str(source), "-o", str(target)])
            return str(target)

        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            objects = list(pool.map(compile_source, sorted(source_folder.glob("*.cpp"))))
        library = Path(folder) / "kernels.so"
        # Linked against torch's libraries by name only: they are in the process before the kernels are loaded.
        _run_compiler(
            ["-shared", "-pthread", *objects, f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10", "-o", str(library)]
        )
        os.replace(library, output)


get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
get_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
get_pointer.restype = ctypes.c_void_p
new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
new_capsule.restype = ctypes.py_object

_CTYPES: dict[str, Any] = {"int": ctypes.c_int64, "float": ctypes.c_double, "bool": ctypes.c_int32}


class Kernels:
    """One kernel library, callable from Python: an attribute for each operator, with the operator's signature."""

    def __init__(self, path: Path, *, use_global_symbols: bool = False) -> None:
        mode = os.RTLD_NOW | (os.RTLD_GLOBAL if use_global_symbols else os.RTLD_LOCAL)
        try:
            self._library = ctypes.CDLL(str(path), mode=mode)
            self._library.xllm_last_error.restype = ctypes.c_char_p
            # Too quick to let go of Python's lock for: another thread would have it for long.
            self.locked = ctypes.PyDLL(str(path), handle=self._library._handle)
            self._delete = self.locked.aoti_torch_delete_tensor_object
            self._functions = {name: self._bind(name) for name in SCHEMAS if self._has(name)}
        except (OSError, AttributeError) as err:
            raise KernelLoadError(f"{path} is not a kernel library for this torch: {err}; rebuild it") from err
        self._delete.argtypes = [ctypes.c_void_p]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        try:
            return cast(dict[str, Callable[..., Any]], self.__dict__["_functions"])[name]
        except KeyError:
            raise AttributeError(name) from None

    def _has(self, name: str) -> bool:
        if hasattr(self._library, f"aoti_torch_cpu_{name}"):
            return True
        logger.warning("no CPU kernel for xllm::%s: its slow reference runs instead", name)
        return False

    def set_num_threads(self, num_threads: int) -> None:
        """Threads the kernels use from now on; 0 is every CPU this process may use."""
        self._library.xllm_set_max_threads(num_threads)

    def names(self) -> list[str]:
        """Operators this library has a kernel for."""
        return list(self._functions)

    def _bind(self, name: str) -> Callable[..., Any]:
        function = getattr(self._library, f"aoti_torch_cpu_{name}")
        schema = torch._C.parse_schema(f"xllm::{name}{SCHEMAS[name]}")
        kinds = [str(argument.type) for argument in schema.arguments]
        num_results = len(schema.returns)
        scalars = [_CTYPES.get(kind, ctypes.c_void_p) for kind in kinds]
        function.argtypes = [*scalars, *[ctypes.c_void_p] * num_results]
        function.restype = ctypes.c_int32
        names = [argument.name for argument in schema.arguments]

        def call(*args: Any, **kwargs: Any) -> Any:
            values = [*args, *(kwargs[key] for key in names[len(args) :])]
            # Handles are new references to the tensors: ours to delete whatever happens.
            handles: list[int] = []
            try:
                converted: list[Any] = []
                for kind, value in zip(kinds, values, strict=True):
                    if kind in _CTYPES or value is None:
                        converted.append(value)
                        continue
                    if value.device.type != "cpu":
                        raise KernelError(f"xllm::{name}: a tensor is on {value.device}, expected cpu")
                    capsule = torch._C._aoti.unsafe_alloc_void_ptr_from_tensor(value)
                    handles.append(get_pointer(capsule, None))
                    optional = kind.startswith("Optional")
                    converted.append(ctypes.byref(ctypes.c_void_p(handles[-1])) if optional else handles[-1])
                results = [ctypes.c_void_p() for _ in range(num_results)]
                if function(*converted, *map(ctypes.byref, results)) != 0:
                    raise KernelError(self._library.xllm_last_error().decode())
            finally:
                for handle in handles:
                    self._delete(handle)
            capsules = [new_capsule(result, None, None) for result in results]
            tensors = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(capsules)
            return tensors[0] if num_results == 1 else tuple(tensors) if num_results > 1 else None

        return call


_loaded: tuple[str, Kernels] | None = None


def load_kernels(path: Path) -> None:
    """Loads a kernel library into the process and registers it for CPU tensors, on as many threads as torch has.

    Its symbols become visible to compiled graphs loaded later. Loading equal bytes again does nothing; loading other
    bytes raises KernelLoadError, because torch operators have one implementation per process.
    """
    global _loaded
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as err:
        raise KernelLoadError(f"cannot read the kernel library {path}: {err}") from err
    if _loaded is not None:
        if _loaded[0] == digest:
            return
        raise KernelLoadError(f"{path} differs from the kernels this process already uses; start a new process")
    kernels = Kernels(path, use_global_symbols=True)
    for name in kernels.names():
        LIBRARY.impl(name, getattr(kernels, name), "CPU")
    kernels.set_num_threads(torch.get_num_threads())
    _loaded = (digest, kernels)
    logger.info("loaded CPU kernels from %s", path)


def copy_bytes() -> Callable[[int, int, int], None]:
    """(target address, source address, num_bytes): copies past the caches, with Python's lock released."""
    assert _loaded is not None, "load_kernels comes first"
    copy = _loaded[1]._library.xllm_copy_bytes
    copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    copy.restype = None
    return cast(Callable[[int, int, int], None], copy)


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolStats:
    """Of the activation pool, in bytes but for ``num_overflows``."""

    capacity: int
    in_use: int
    peak: int
    """The end of the highest block since the last reset."""
    num_overflows: int
    """Allocations that did not fit and came from torch's allocator instead."""


class ActivationPool:
    """What is allocated inside ``with pool:`` on this thread comes from one reserved range, as long as it fits.

    One pool a process, of the largest size anybody asked for; address space only, pages arrive on touch. Where it
    cannot be reserved (a strict limit on address space), torch's allocator goes on as before.
    """

    def __init__(self, num_bytes: int) -> None:
        assert _loaded is not None, "load_kernels comes first"
        library = _loaded[1]._library
        self._enter, self._leave = _loaded[1].locked.xllm_pool_enter, _loaded[1].locked.xllm_pool_leave
        self._stats, self._reset = library.xllm_pool_stats, library.xllm_pool_reset_peak
        library.xllm_pool_reserve.argtypes = [ctypes.c_int64]
        if library.xllm_pool_reserve(num_bytes) != 0:
            logger.warning(
                "the activation pool cannot grow to %d bytes: what does not fit is allocated anew", num_bytes
            )

    def __enter__(self) -> None:
        self._enter()

    def __exit__(self, *exception: object) -> None:
        self._leave()

    def stats(self) -> PoolStats:
        values = [ctypes.c_int64() for _ in range(4)]
        self._stats(*map(ctypes.byref, values))
        capacity, in_use, peak, num_overflows = (value.value for value in values)
        return PoolStats(capacity=capacity, in_use=in_use, peak=peak, num_overflows=num_overflows)

    def reset_peak(self) -> None:
        self._reset()


def is_loaded() -> bool:
    """Whether load_kernels has run in this process."""
    return _loaded is not None


def set_num_threads(num_threads: int) -> None:
    """Threads that the loaded kernels use from now on; 0 is every CPU this process may use."""
    assert _loaded is not None, "load_kernels comes first"
    _loaded[1].set_num_threads(num_threads)


def graph_chain() -> Any:
    """The C function that runs compiled graphs one after the other, see cpu/graph_chain.cpp."""
    assert _loaded is not None, "load_kernels comes first"
    function = _loaded[1]._library.xllm_run_chain
    function.restype = ctypes.c_int64
    return function


def run_step() -> Any:
    """The C function that runs all graphs of a step, see cpu/graph_chain.cpp."""
    assert _loaded is not None, "load_kernels comes first"
    return _loaded[1]._library.xllm_run_step


def decode_greedily() -> Any:
    """The C function that runs decode steps in a loop, see cpu/graph_chain.cpp."""
    assert _loaded is not None, "load_kernels comes first"
    function = _loaded[1]._library.xllm_decode_greedily
    function.restype = ctypes.c_int64
    return function


def draw() -> Any:
    """The C function that draws tokens from rows of logits, see cpu/draw.cpp."""
    assert _loaded is not None, "load_kernels comes first"
    return _loaded[1]._library.xllm_draw


def last_error() -> str:
    """What the last native call of this thread that failed says."""
    assert _loaded is not None, "load_kernels comes first"
    return cast(bytes, _loaded[1]._library.xllm_last_error()).decode()


def delete_handle(handle: int) -> None:
    """Drop a reference to a tensor that came as a handle."""
    assert _loaded is not None, "load_kernels comes first"
    _loaded[1]._delete(handle)
