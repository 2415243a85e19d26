"""The machine's own limits: how fast memory is read and matrices are multiplied, with as many threads as an engine has.

Measured in a process of its own, shortly before and after what is compared with them: on a shared host the memory
bandwidth changes within minutes, and with where in the host's memory the pages lie. So the very weights that an engine
streams are read too, and the better figure counts. ``python -m xllm_compile.benchmarks.limits ARTIFACT`` prints JSON;
with ``--read`` of the read bandwidth alone.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from xllm_compile.benchmarks.timing import measure

# Far beyond any cache; small enough to fill in a moment.
_READ_BYTES = 1 << 30
_READ_PASSES = 9
_MULTIPLY_STEPS = 10_000_000
_ONLY_READ = "--read"
# (M, K, N): square ones, and a prefill's largest linear.
_GEMM_SIZES = ((2048, 2048, 2048), (4096, 4096, 4096), (512, 1024, 6144))


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    num_threads: int
    read_gb_per_s: float
    """Nothing but loads and adds: median of passes over a large buffer in huge pages or over the mapped weights file,
    whichever is faster."""
    bf16_gemm_gflops: float
    """Best of torch.matmul over some sizes."""
    f32_gemm_gflops: float
    bf16_packed_32_gflops: float
    """Our product of 32 rows with a packed weight that stays in cache: what a decode step of 32 can reach."""
    bf16_register_gflops: float
    """Multiply-adds on registers only: no product is faster."""
    f32_register_gflops: float


def measure_limits(artifact: Path) -> Limits:
    """The artifact's kernel library holds the two measuring loops. Raises RuntimeError with the process's message."""
    return Limits(**_measure_apart(artifact))


def with_read_of_now(limits: Limits, artifact: Path) -> Limits:
    """The same but for the read bandwidth, which is measured now: half the time that all of them take."""
    return replace(limits, read_gb_per_s=_measure_apart(artifact, _ONLY_READ)["read_gb_per_s"])


def _measure_apart(artifact: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "xllm_compile.benchmarks.limits", str(artifact), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"measuring the machine's limits failed:\n{done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _measure_here(artifact: Path, *, only_read: bool) -> dict[str, Any]:
    import ctypes

    import torch

    from xllm_compile.runtime.artifact import WEIGHTS, cpu_kernels, read_manifest

    kernels = cpu_kernels(artifact, read_manifest(artifact)).path
    library = ctypes.CDLL(str(artifact / kernels))
    library.xllm_measure_read.restype = library.xllm_measure_multiply.restype = ctypes.c_double
    library.xllm_measure_read.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.xllm_measure_multiply.argtypes = [ctypes.c_int32, ctypes.c_int64]
    read_gb_per_s = _read_rate(library.xllm_measure_read, artifact / WEIGHTS) / 1e9
    if only_read:
        return {"read_gb_per_s": read_gb_per_s}
    limits = Limits(
        num_threads=torch.get_num_threads(),
        read_gb_per_s=read_gb_per_s,
        bf16_gemm_gflops=_gemm_rate(torch.bfloat16) / 1e9,
        f32_gemm_gflops=_gemm_rate(torch.float32) / 1e9,
        bf16_packed_32_gflops=_packed_rate(artifact / kernels, 32) / 1e9,
        bf16_register_gflops=max(library.xllm_measure_multiply(1, _MULTIPLY_STEPS) for _ in range(3)) / 1e9,
        f32_register_gflops=max(library.xllm_measure_multiply(0, _MULTIPLY_STEPS) for _ in range(3)) / 1e9,
    )
    return asdict(limits)


def _read_rate(measure_read: Callable[[int, int], float], weights: Path) -> float:
    import mmap
    import statistics

    import numpy as np

    buffer = mmap.mmap(-1, _READ_BYTES)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        buffer.madvise(mmap.MADV_HUGEPAGE)
    fresh = np.frombuffer(buffer, dtype=np.uint8)
    # Untouched pages would all be the one page of zeros.
    fresh[:] = 1
    # Mapped as the runtime maps it. The first pass brings the pages in.
    with weights.open("rb") as file:
        mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=np.uint8)
    rates = []
    # A small model's weights would be read from the caches.
    for data in (fresh, mapped) if mapped.nbytes >= _READ_BYTES // 4 else (fresh,):
        passes = [measure_read(data.ctypes.data, data.nbytes) for _ in range(_READ_PASSES + 1)]
        rates.append(statistics.median(passes[1:]))
    return max(rates)


def _gemm_rate(dtype: Any) -> float:
    from functools import partial

    import torch

    best = 0.0
    for rows, inner, columns in _GEMM_SIZES:
        a, b = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
        seconds = measure(partial(torch.matmul, a, b), warmup=1, repeats=3).median
        best = max(best, 2 * rows * inner * columns / seconds)
    return best


def _packed_rate(kernels: Path, rows: int) -> float:
    import torch

    from xllm_compile.runtime.ops.native import Kernels
    from xllm_compile.runtime.ops.reference import pack_weight

    inner, columns, calls = 1024, 1024, 50
    x, weight = torch.randn(rows, inner).bfloat16(), pack_weight(torch.randn(columns, inner).bfloat16())
    multiply = Kernels(kernels).packed_linear
    seconds = measure(lambda: [multiply(x, weight, None, columns, False) for _ in range(calls)], repeats=5).median
    return 2 * rows * inner * columns * calls / seconds


if __name__ == "__main__":
    print(json.dumps(_measure_here(Path(sys.argv[1]), only_read=_ONLY_READ in sys.argv[2:])))
