"""Weights mapped from their file against a copy in huge pages: opening them, and reading them in a decode step."""

import mmap
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from xllm_compile.benchmarks.console import finish, say, show_table
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.timing import Summary, measure_in_turns, summarise
from xllm_compile.runtime.memory.cpu_memory import HUGE_PAGE_BYTES, CpuMemory
from xllm_compile.runtime.ops import native

# One product of a 0.6B model, as often as fills half a gigabyte.
_INPUTS, _OUTPUTS, _NUM_PRODUCTS = 1024, 6144, 40
_NUM_BYTES = _INPUTS * _OUTPUTS * 2 * _NUM_PRODUCTS
_SHAPE = (_NUM_PRODUCTS, _OUTPUTS // 32, _INPUTS // 2, 32, 2)


def run_weights_memory(work_dir: Path, results: Path, command: Sequence[str], *, rounds: int) -> None:
    """Measure and write weights_memory.json."""
    work_dir.mkdir(parents=True, exist_ok=True)
    library, path = work_dir / "kernels.so", work_dir / "weights.bin"
    native.build_kernels(library)
    native.load_kernels(library)
    path.write_bytes((torch.randn(_NUM_BYTES // 2) / 32).to(torch.bfloat16).view(torch.uint8).numpy().data)
    x = torch.randn(1, _INPUTS).to(torch.bfloat16)
    ways = {"mapped file": _mapped, "copy in huge pages": _copied}
    weights: dict[str, Tensor] = {}
    opening: dict[str, Summary] = {}
    for name, way in ways.items():
        say(f"weights: {name}")
        began = time.perf_counter()
        weights[name] = way(path)
        # The first pass brings what opening has only mapped.
        _decode(weights[name], x)
        opening[name] = summarise([time.perf_counter() - began])
    decode = measure_in_turns({name: partial(_decode, each, x) for name, each in weights.items()}, repeats=rounds)
    rows = [(name, f"{opening[name].median:.3f}", f"{1000 * decode[name].median:.1f}") for name in ways]
    show_table(f"{_NUM_BYTES >> 20} MiB of weights", ("", "to the end of the first pass, s", "a pass, ms"), rows)
    mapped, copied = ways
    ratio = decode[copied].median / decode[mapped].median
    raw = {
        "num_bytes": _NUM_BYTES,
        "opening_s": {name: summary.to_json() for name, summary in opening.items()},
        "decode_s": {name: summary.to_json() for name, summary in decode.items()},
    }
    bars = [
        # Else the copy would be worth its memory.
        Bar(what="decode from huge pages against the mapped file", value=ratio, unit="x", bar=">= 0.97"),
        Bar(
            what="opening, the copy against the mapped file",
            value=opening[copied].median / opening[mapped].median,
            unit="x",
        ),
    ]
    finish(make_record("weights_memory", command, seed=0, raw=raw, bars=bars), results)
    path.unlink()


def _mapped(path: Path) -> Tensor:
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return torch.frombuffer(mapping, dtype=torch.bfloat16).view(_SHAPE)


def _copied(path: Path) -> Tensor:
    num_pages = -(-_NUM_BYTES // HUGE_PAGE_BYTES)
    memory = CpuMemory(num_pages, HUGE_PAGE_BYTES)
    address = memory.reserve(num_pages * HUGE_PAGE_BYTES)
    for page in range(num_pages):
        memory.map(address + page * HUGE_PAGE_BYTES, page)
    buffer = memory.tensor(address, num_pages * HUGE_PAGE_BYTES)[:_NUM_BYTES]
    left = memoryview(buffer.numpy().data)
    with path.open("rb", buffering=0) as file:
        while left:
            left = left[file.readinto(left) :]
    return buffer.view(torch.bfloat16).view(_SHAPE)


def _decode(weights: Tensor, x: Tensor) -> None:
    for weight in weights:
        torch.ops.xllm.packed_linear(x, weight, None, _OUTPUTS, False)
