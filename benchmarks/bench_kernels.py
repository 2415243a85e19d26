"""The CPU kernels against limits measured in the same rounds (memory bandwidth, multiply-add peak) and against peers:
oneDNN, and for quantised weights the product of the bfloat16 ones.

Shapes of Qwen3-0.6B, bfloat16. Every rate is a share of a limit that was measured in the same round, and the median
over rounds is reported, because a shared machine's speed wanders. Cold products rotate over more weights than the
last-level cache holds, as a decode step does.
"""

import ctypes
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.timing import Summary, measure, measure_in_turns
from xllm_compile.graph_passes.quantisation import SCHEMES, Quantisation

if TYPE_CHECKING:
    from torch import Tensor

    from xllm_compile.runtime.ops.native import Kernels

SHAPES = {"qkv": (1024, 4096), "o": (2048, 1024), "gate_up": (1024, 6144), "down": (3072, 1024)}
HEAD = (1024, 151936)
HEADS, KV_HEADS, HEAD_DIM = 16, 8, 128
COLD_BYTES = 600_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Work of one call and seconds of the call, of the limit it is measured against, and of a peer, round by round."""

    name: str
    work: float
    """Bytes or floating-point operations."""
    unit: str
    seconds: Summary
    limit: Sequence[float]
    """Limit of each round, in work per second."""
    peer: Summary | None = None
    bar: str = ""
    peer_bar: str = ""
    """Of against_peer."""

    @property
    def rate(self) -> float:
        return self.work / self.seconds.median

    @property
    def share(self) -> float:
        pairs = zip(self.seconds.values, self.limit, strict=True)
        return statistics.median(self.work / seconds / limit for seconds, limit in pairs)

    @property
    def against_peer(self) -> float | None:
        if self.peer is None:
            return None
        return statistics.median(b / a for a, b in zip(self.seconds.values, self.peer.values, strict=True))


class Bench:
    def __init__(self, kernels: "Kernels", rounds: int) -> None:
        import torch

        self.kernels, self.rounds = kernels, rounds
        library = kernels._library
        self._read, self._multiply = library.xllm_measure_read, library.xllm_measure_multiply
        self._read.restype = self._multiply.restype = ctypes.c_double
        self._read.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        self._multiply.argtypes = [ctypes.c_int32, ctypes.c_int64]
        self.lines: list[Line] = []
        tiny, row = torch.zeros(1, 1, 32, 2, dtype=torch.bfloat16), torch.zeros(1, 2, dtype=torch.bfloat16)
        calls = measure(lambda: [kernels.packed_linear(row, tiny, None, 32, False) for _ in range(1000)])
        self.call_s = calls.median / 1000
        """Cost of the Python call, taken off every time: compiled graphs call the functions themselves."""

    def against_memory(
        self,
        name: str,
        run: Callable[[], int],
        buffer: "Tensor",
        work: float,
        bar: str = "",
        peer: Callable[[], Any] | None = None,
    ) -> None:
        size = buffer.numel() * buffer.element_size()
        rates: list[float] = []
        runs: dict[str, Callable[[], Any]] = {
            "ours": run,
            "read": lambda: rates.append(self._read(buffer.data_ptr(), size)),
        }
        if peer is not None:
            runs["peer"] = peer
        seconds = measure_in_turns(runs, repeats=self.rounds)
        # The warm-up round has a rate too.
        self._add(name, work, "GB/s", seconds["ours"], rates[1:], run(), seconds.get("peer"), bar)

    def against_peak(
        self,
        name: str,
        run: Callable[[], int],
        work: float,
        peer: Callable[[], Any] | None = None,
        bar: str = "",
        peer_bar: str = "",
    ) -> None:
        rates: list[float] = []
        runs: dict[str, Callable[[], Any]] = {"ours": run, "peak": lambda: rates.append(self._multiply(1, 1_000_000))}
        if peer is not None:
            runs["peer"] = peer
        seconds = measure_in_turns(runs, repeats=self.rounds)
        self._add(name, work, "GFLOP/s", seconds["ours"], rates[1:], run(), seconds.get("peer"), bar, peer_bar)

    def _add(
        self,
        name: str,
        work: float,
        unit: str,
        seconds: Summary,
        limit: Sequence[float],
        calls: int,
        peer: Summary | None,
        bar: str,
        peer_bar: str = "",
    ) -> None:
        ours = Summary(values=tuple(value - calls * self.call_s for value in seconds.values))
        line = Line(
            name=name, work=work, unit=unit, seconds=ours, limit=tuple(limit), peer=peer, bar=bar, peer_bar=peer_bar
        )
        self.lines.append(line)
        against = f"{line.against_peer:.2f}" if line.against_peer is not None else ""
        rate, limit_rate = line.rate / 1e9, statistics.median(limit) / 1e9
        click.echo(f"{name:34} {rate:8.1f} {limit_rate:8.1f} {unit:8} {line.share:6.2f} {against:>8}")


def cold_linears(bench: Bench) -> None:
    """The peer is oneDNN on weights in its own layout, which it chooses by the number of rows."""
    import torch

    for rows in (1, 2, 4, 8, 16, 32):
        for name, (inputs, outputs) in {**SHAPES, "head": HEAD}.items():
            count = max(1, COLD_BYTES // (inputs * outputs * 2))
            weights = torch.empty(count, outputs // 32, inputs // 2, 32, 2, dtype=torch.bfloat16)
            weights.copy_(torch.randn(inputs // 2, 32, 2).bfloat16())
            x = torch.randn(rows, inputs).bfloat16()

            def run(weights: "Tensor" = weights, x: "Tensor" = x, outputs: int = outputs) -> int:
                for weight in weights:
                    bench.kernels.packed_linear(x, weight, None, outputs, False)
                return len(weights)

            dense = torch.randn(outputs, inputs).bfloat16()
            library = [torch.ops.mkldnn._reorder_linear_weight(dense, rows) for _ in range(count)]

            def peer(library: "list[Tensor]" = library, x: "Tensor" = x) -> None:
                for weight in library:
                    torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

            bar = ">= 0.85" if rows == 1 else ""
            bench.against_memory(f"linear {name}, {rows} rows, cold", run, weights, weights.numel() * 2, bar, peer)


def hot_linears(bench: Bench) -> None:
    import torch

    from xllm_compile.runtime.ops.reference import pack_weight

    for rows in (16, 64, 128, 512, 2048):
        for name, (inputs, outputs) in SHAPES.items():
            x, dense = torch.randn(rows, inputs).bfloat16(), torch.randn(outputs, inputs).bfloat16()
            weight = pack_weight(dense)
            flops = 2 * rows * inputs * outputs
            calls = max(1, int(4e9 / flops))

            def run(x: "Tensor" = x, weight: "Tensor" = weight, outputs: int = outputs, calls: int = calls) -> int:
                for _ in range(calls):
                    bench.kernels.packed_linear(x, weight, None, outputs, False)
                return calls

            def peer(x: "Tensor" = x, dense: "Tensor" = dense, calls: int = calls) -> None:
                for _ in range(calls):
                    torch.nn.functional.linear(x, dense)

            bar = ">= 0.8" if rows >= 512 else ""
            bench.against_peak(f"linear {name}, {rows} rows", run, flops * calls, peer, bar)


def quantised_linears(bench: Bench) -> None:
    """Weights from memory: a row against memory's rate, several rows against the same product of bfloat16 weights."""
    import torch

    from xllm_compile.runtime.ops.quantised import quantise_packed
    from xllm_compile.runtime.ops.reference import pack_weight

    for name, (inputs, outputs) in SHAPES.items():
        dense = torch.randn(outputs, inputs)
        count = COLD_BYTES // (2 * inputs * outputs)
        plain = pack_weight(dense.bfloat16()).unsqueeze(0).repeat(count, 1, 1, 1, 1)
        for scheme in SCHEMES:
            kind = Quantisation(scheme=scheme).weight_kind
            packed = quantise_packed(dense, kind, 32)
            # As many as fill the caches in the quantised form, too.
            size = sum(part.numel() * part.element_size() for part in packed)
            weights = [part.unsqueeze(0).repeat(COLD_BYTES // 2 // size, *[1] * part.dim()) for part in packed]
            linear = getattr(bench.kernels, f"{scheme.replace('-', '_')}_linear")
            for rows in (1, 8, 16, 32, 512):
                x, flops = torch.randn(rows, inputs).bfloat16(), 2 * rows * inputs * outputs
                calls = min(count, len(weights[0]), max(2, int(2e10 / flops)))

                def run(
                    linear: Callable[..., Any] = linear,
                    weights: "Sequence[Tensor]" = weights,
                    x: "Tensor" = x,
                    outputs: int = outputs,
                    calls: int = calls,
                ) -> int:
                    for index in range(calls):
                        linear(x, *(part[index] for part in weights), None, outputs, False)
                    return calls

                def peer(plain: "Tensor" = plain, x: "Tensor" = x, outputs: int = outputs, calls: int = calls) -> None:
                    for index in range(calls):
                        bench.kernels.packed_linear(x, plain[index], None, outputs, False)

                if rows == 1:
                    bench.against_memory(f"{scheme} {name}, 1 row, cold", run, plain, size * calls)
                else:
                    label = f"{scheme} {name}, {rows} rows, cold"
                    peer_bar = ">= 1.5" if scheme != kind and rows >= 32 else ">= 1"
                    bench.against_peak(label, run, flops * calls, peer, peer_bar=peer_bar)


def attentions(bench: Bench) -> None:
    import torch

    scale = HEAD_DIM**-0.5
    for sequences, context in ((1, 128), (1, 2048), (8, 512), (8, 2048), (32, 512)):
        size = sequences * context * 2 * KV_HEADS * HEAD_DIM * 2
        layers = max(2, COLD_BYTES // size)
        cache = torch.empty(layers * sequences, context, 2, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16)
        cache.copy_(torch.randn(context, 2, KV_HEADS, HEAD_DIM).bfloat16())
        q = torch.randn(sequences, HEADS, HEAD_DIM).bfloat16()
        start = torch.arange(sequences + 1, dtype=torch.int32)
        length = torch.full((sequences,), context, dtype=torch.int32)
        slots = torch.arange(layers * sequences, dtype=torch.int32).view(layers, sequences)
        call = partial(bench.kernels.attention, q, cache, start, length)

        def decode(call: Callable[..., Any] = call, slots: "Tensor" = slots) -> int:
            for slot in slots:
                call(slot, scale, 0)
            return len(slots)

        bench.against_memory(f"decode, {sequences} x {context} keys, cold", decode, cache, size * layers)
    for tokens, context in ((512, 512), (2048, 2048), (256, 2304)):
        cache = torch.randn(1, context, 2, KV_HEADS, HEAD_DIM).bfloat16()
        q = torch.randn(tokens, HEADS, HEAD_DIM).bfloat16()
        start, length = torch.tensor([0, tokens], dtype=torch.int32), torch.tensor([context], dtype=torch.int32)
        call = partial(bench.kernels.attention, q, cache, start, length, torch.zeros(1, dtype=torch.int32), scale, 0)
        flops = 4 * HEADS * HEAD_DIM * sum(range(context - tokens + 1, context + 1))
        calls = max(1, int(2e9 / flops))

        def prefill(call: Callable[..., Any] = call, calls: int = calls) -> int:
            for _ in range(calls):
                call()
            return calls

        # Half of what a linear reaches (0.8 of the peak).
        bench.against_peak(f"prefill, {tokens} of {context} tokens", prefill, flops * calls, bar=">= 0.4")


def token_wise(bench: Bench) -> None:
    """Reads and writes, counted as bytes; these stay in cache, so the share of memory bandwidth may pass 1.

    Not for one token: from Python the call costs more than the work.
    """
    import torch

    buffer = torch.zeros(1 << 28, dtype=torch.uint8)
    for tokens in (64, 512):
        x, weight = torch.randn(tokens, 1024).bfloat16(), torch.ones(1024).bfloat16()
        gate_up = torch.randn(tokens, 6144).bfloat16()
        qkv = torch.randn(tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM).bfloat16()
        norm, angle = torch.ones(HEAD_DIM).bfloat16(), torch.rand(tokens, HEAD_DIM // 2)
        cache = torch.zeros(1, tokens, 2, KV_HEADS, HEAD_DIM).bfloat16()
        positions, slot = torch.arange(tokens, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        start = torch.tensor([0, tokens], dtype=torch.int32)
        kernels = bench.kernels
        write = (cache, positions, start, slot, HEADS, KV_HEADS, 1e-6)
        operators: dict[str, tuple[Callable[[], Any], int]] = {
            "add_rms_norm": (partial(kernels.add_rms_norm, x, x, weight, 1e-6), 8 * x.numel()),
            "silu_mul": (partial(kernels.silu_mul, gate_up), 3 * gate_up.numel()),
            "qkv_rope_write": (
                partial(kernels.qkv_rope_write, qkv, norm, norm, angle.cos(), angle.sin(), *write),
                4 * qkv.numel(),
            ),
        }
        for name, (call, size) in operators.items():

            def run(call: Callable[[], Any] = call) -> int:
                for _ in range(100):
                    call()
                return 100

            bench.against_memory(f"{name}, {tokens} tokens, hot", run, buffer, size * 100)


PARTS = {
    "cold": cold_linears,
    "hot": hot_linears,
    "quantised": quantised_linears,
    "attention": attentions,
    "token-wise": token_wise,
}


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--part", "parts", type=click.Choice(list(PARTS)), multiple=True, default=list(PARTS), help="Which.")
@click.option("--rounds", type=click.IntRange(min=1), default=7, help="Rounds of each measurement.")
@click.option(
    "--threads", type=click.IntRange(min=1), default=len(os.sched_getaffinity(0)), help="Of kernels and peer."
)
@click.option("--json", "output", type=click.Path(path_type=Path, dir_okay=False), help="Write the record here.")
def main(parts: Sequence[str], rounds: int, threads: int, output: Path | None) -> None:
    """Measure the CPU kernels against the machine's limits, in turns."""
    # Before torch is loaded: workers of its OpenMP that spin after a call would take a core from the kernels' pool.
    os.environ["OMP_WAIT_POLICY"] = "passive"
    import torch

    from xllm_compile.runtime.ops import native

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "kernels.so"
        native.build_kernels(library)
        kernels = native.Kernels(library)
    kernels.set_num_threads(threads)
    bench = Bench(kernels, rounds)
    click.echo(f"{'':34} {'ours':>8} {'limit':>8} {'':8} {'share':>6} {'/ peer':>8}")
    for part in parts:
        PARTS[part](bench)
    if output is not None:
        raw = {
            "threads": threads,
            "call_s": bench.call_s,
            "lines": [
                {
                    "name": line.name,
                    "work": line.work,
                    "unit": line.unit,
                    "seconds": line.seconds.to_json(),
                    "limit_per_s": list(line.limit),
                    "peer_seconds": line.peer.to_json() if line.peer else None,
                }
                for line in bench.lines
            ],
        }
        bars = [
            Bar(what=f"{line.name}: share of limit", value=line.share, unit="", bar=line.bar) for line in bench.lines
        ]
        bars += [
            Bar(what=f"{line.name}: against bfloat16 weights", value=line.against_peer, unit="x", bar=line.peer_bar)
            for line in bench.lines
            if line.peer_bar and line.against_peer is not None
        ]
        record = make_record(output.stem, ["bench_kernels", *sys.argv[1:]], seed=0, raw=raw, bars=bars)
        click.echo(f"wrote {record.write(output.parent)}")


if __name__ == "__main__":
    main()
