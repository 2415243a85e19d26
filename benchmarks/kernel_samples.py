"""Seconds of the compiled kernels on a model's own shapes, each with the work the cost model counts for it."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from xllm_compile.benchmarks.fit_efficiency import Sample
from xllm_compile.benchmarks.timing import measure
from xllm_compile.graph_passes.cost_model import NodeCost
from xllm_compile.graph_passes.step_shape import StepShape
from xllm_compile.models.config import DecoderConfig
from xllm_compile.runtime.ops.quantised import quantise_packed
from xllm_compile.runtime.ops.reference import pack_weight

if TYPE_CHECKING:
    from xllm_compile.runtime.ops.native import Kernels

# More than a last-level cache holds: weights and caches are read from memory, as in a step.
_COLD_BYTES = 600_000_000
_PASS_FLOPS = 2e10
_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 64, 128, 256, 512)
# Sequences as (new tokens, context) times how many.
_ATTENTION = (
    *(((1, context), count) for context, count in ((64, 1), (512, 1), (2048, 1), (512, 4), (128, 16), (1024, 8))),
    *(((new, context), 1) for new, context in ((64, 64), (256, 256), (512, 512), (64, 1024), (256, 1280), (512, 2048))),
)


class KernelSamples:
    """Measures through ``kernels``. The Python call's own time is taken off: compiled graphs call the kernels
    themselves."""

    def __init__(self, kernels: "Kernels", config: DecoderConfig, dtype: torch.dtype, repeats: int) -> None:
        self.kernels, self.config, self.dtype, self.repeats = kernels, config, dtype, repeats
        tiny, row = pack_weight(torch.zeros(32, 2, dtype=dtype)), torch.zeros(1, 2, dtype=dtype)
        calls = measure(lambda: [kernels.packed_linear(row, tiny, None, 32, False) for _ in range(1000)])
        self.call_s = calls.median / 1000

    def measure(self) -> Iterator[tuple[str, Sample]]:
        """(what was measured, its work and seconds) one by one."""
        yield from self._linears()
        yield from self._attentions()
        yield from self._token_wise()

    def rounded_linears(self) -> Iterator[tuple[str, Sample]]:
        """Products of a layer on activations rounded to int8, with int8 weights and rows enough to compute for long."""
        for name, (inner, columns) in self._layer_shapes().items():
            weight, scale = quantise_packed(torch.randn(columns, inner), "int8", 0)
            for rows in (64, 128, 256, 512):
                flops = 2.0 * rows * inner * columns
                x = torch.randn(rows, inner).to(self.dtype)
                call = partial(self.kernels.int8_dynamic_linear, x, weight, scale, None, columns, False)
                cost = NodeCost(
                    unit="cube",
                    family="linear",
                    dtype="int8",
                    flops=flops,
                    flops_per_row=flops / rows,
                    outputs=(1, rows, columns),
                    bytes_read=weight.numel() + x.numel() * self.dtype.itemsize,
                    bytes_written=rows * columns * self.dtype.itemsize,
                )
                yield (
                    f"rounded linear {name}, {rows} rows",
                    (cost, self._seconds([call] * int(max(2, _PASS_FLOPS // flops)))),
                )

    def _layer_shapes(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each product."""
        c = self.config
        return {
            "qkv": (c.hidden_size, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim),
            "o": (c.num_heads * c.head_dim, c.hidden_size),
            "gate_up": (c.hidden_size, 2 * c.intermediate_size),
            "down": (c.intermediate_size, c.hidden_size),
        }

    def _linears(self) -> Iterator[tuple[str, Sample]]:
        c = self.config
        shapes = {**self._layer_shapes(), "head": (c.hidden_size, c.vocab_size)}
        size = self.dtype.itemsize
        for name, (inner, columns) in shapes.items():
            packed = pack_weight(torch.randn(columns, inner).to(self.dtype))
            weight_bytes = packed.numel() * size
            weights = packed.unsqueeze(0).repeat(max(1, _COLD_BYTES // weight_bytes), *[1] * packed.dim())
            for rows in _ROWS if name != "head" else (1, 4, 8):
                flops = 2.0 * rows * inner * columns
                count = int(min(len(weights), max(2, _PASS_FLOPS // flops)))
                x = torch.randn(rows, inner).to(self.dtype)
                call = partial(self.kernels.packed_linear, x)
                calls = [partial(call, weights[index], None, columns, False) for index in range(count)]
                cost = NodeCost(
                    unit="cube",
                    family="linear",
                    dtype=str(self.dtype).removeprefix("torch."),
                    flops=flops,
                    flops_per_row=flops / rows,
                    outputs=(1, rows, columns),
                    bytes_read=weight_bytes + rows * inner * size,
                    bytes_cold=weight_bytes,
                    bytes_written=rows * columns * size,
                )
                yield f"linear {name}, {rows} rows", (cost, self._seconds(calls))

    def _attentions(self) -> Iterator[tuple[str, Sample]]:
        c, size = self.config, self.dtype.itemsize
        for (new, context), count in _ATTENTION:
            key_bytes = 2 * c.num_kv_heads * c.head_dim * size
            sets = max(2, min(64, _COLD_BYTES // (count * context * key_bytes)))
            cache = torch.randn(context, 2, c.num_kv_heads, c.head_dim).to(self.dtype).repeat(sets * count, 1, 1, 1, 1)
            q = torch.randn(count * new, c.num_heads, c.head_dim).to(self.dtype)
            starts = torch.arange(0, count * new + 1, new, dtype=torch.int32)
            lengths = torch.full((count,), context, dtype=torch.int32)
            slots = torch.arange(sets * count, dtype=torch.int32).view(sets, count)
            call = partial(self.kernels.attention, q, cache, starts, lengths)
            step = StepShape(sequences=((new, context),) * count)
            pairs = count * step.query_keys(new, context)
            pair_flops = 4.0 * c.num_heads * c.head_dim
            moved = count * new * c.num_heads * c.head_dim * size
            cost = NodeCost(
                unit="cube",
                family="attention",
                dtype=str(self.dtype).removeprefix("torch."),
                flops=pair_flops * pairs,
                flops_per_row=pair_flops * pairs / new,
                bytes_read=step.keys_read() * key_bytes + moved,
                bytes_cold=step.keys_read() * key_bytes,
                bytes_written=moved,
            )
            calls = [partial(call, slot, c.head_dim**-0.5, 0) for slot in slots]
            yield f"attention, {count} x {new} new of {context}", (cost, self._seconds(calls))

    def _token_wise(self) -> Iterator[tuple[str, Sample]]:
        c, kernels, size = self.config, self.kernels, self.dtype.itemsize
        for tokens in (1, 8, 64, 256, 512):
            x, norm = torch.randn(tokens, c.hidden_size).to(self.dtype), torch.ones(c.hidden_size).to(self.dtype)
            gate_up = torch.randn(tokens, 2 * c.intermediate_size).to(self.dtype)
            qkv = torch.randn(tokens, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim).to(self.dtype)
            angle = torch.rand(tokens, c.rotary_dim // 2)
            cache = torch.zeros(1, tokens, 2, c.num_kv_heads, c.head_dim).to(self.dtype)
            head_norm = torch.ones(c.head_dim).to(self.dtype) if c.has_qk_norm else None
            positions, slot = torch.arange(tokens, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
            start = torch.tensor([0, tokens], dtype=torch.int32)
            write = (cache, positions, start, slot, c.num_heads, c.num_kv_heads, 1e-6)
            operators: dict[str, tuple[Callable[[], Any], float, float, float]] = {
                # Call, operations, elements read, elements written.
                "add_rms_norm": (partial(kernels.add_rms_norm, x, x, norm, 1e-6), 5.0 * x.numel(), 2, 2),
                "silu_mul": (partial(kernels.silu_mul, gate_up), 3.0 * gate_up.numel(), 1, 0.5),
                "qkv_rope_write": (
                    partial(kernels.qkv_rope_write, qkv, head_norm, head_norm, angle.cos(), angle.sin(), *write),
                    8.0 * qkv.numel(),
                    1,
                    1,
                ),
            }
            elements = {"add_rms_norm": x.numel(), "silu_mul": gate_up.numel(), "qkv_rope_write": qkv.numel()}
            for name, (call, flops, read, written) in operators.items():
                cost = NodeCost(
                    unit="vector",
                    family="token_wise",
                    dtype=str(self.dtype).removeprefix("torch."),
                    flops=flops,
                    bytes_read=read * elements[name] * size,
                    bytes_written=written * elements[name] * size,
                )
                yield f"{name}, {tokens} tokens", (cost, self._seconds([call] * 50))

    def _seconds(self, calls: Sequence[Callable[[], Any]]) -> float:
        def run() -> None:
            for call in calls:
                call()

        per_call = measure(run, repeats=self.repeats).median / len(calls) - self.call_s
        # A call cannot cost less than nothing, nor be told apart from nothing below a tenth of its overhead.
        return max(per_call, self.call_s / 10)
