"""What the Ascend operators of a lowered graph compute, in plain torch after their documentation, and the step metadata
they want. Written apart from runtime/ops/reference.py, so that wrong wiring of one is not repeated in the other."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from tests.graph_passes.regions import make_weight
from xllm_compile.graph_passes.region import RegionGraph
from xllm_compile.runtime.ops.npu import BLOCK_TOKENS, MASK_SIZE


class NpuEmulator(fx.Interpreter):
    """Runs the Ascend operators as the functions below, everything else as it is."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = target._schema.name if isinstance(target, torch._ops.OpOverload) else ""
        if name.startswith(("npu::", "air::", "xllm_npu::")):
            return _OPERATORS[name](*args, **kwargs)
        return super().call_function(target, args, kwargs)


def run_lowered(region: RegionGraph, inputs: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Outputs by number and inputs after the run by name, as regions.run_graph gives them."""
    given = {spec.name: inputs[spec.name].clone() for spec in region.inputs}
    weights = [make_weight(spec, seed) for spec in region.weights.values()]
    with torch.no_grad():
        outputs = NpuEmulator(region.module).run(*given.values(), *weights)
    return {**given, **{str(index): output for index, output in enumerate(outputs)}}


def npu_layer_inputs(inputs: Mapping[str, Tensor], num_blocks: int, blocks_per_seq: int) -> dict[str, Tensor]:
    """A layer region's inputs for the CPU as the NPU takes them: slot s owns the blocks after those of slot s - 1."""
    lengths = inputs["seq_start"].diff().tolist()
    positions, slots = inputs["positions"].tolist(), inputs["slot"].tolist()
    num_tokens = len(positions)
    write_at = [0] * num_tokens
    row = 0
    for length, slot in zip(lengths, slots, strict=True):
        for _ in range(length):
            write_at[row] = first_row(slot, blocks_per_seq) + positions[row]
            row += 1
    # Padding rows are one sequence more, in block 0.
    padding = num_tokens - row
    query_end = inputs["seq_start"][1:].tolist() + [num_tokens] * bool(padding)
    kv_len = inputs["context_len"].tolist() + [padding] * bool(padding)
    tables = [[1 + slot * blocks_per_seq + i for i in range(blocks_per_seq)] for slot in slots]
    tables += [[0] * blocks_per_seq] * bool(padding)
    cache = inputs["kv_cache"]
    flat = torch.zeros(2, num_blocks * BLOCK_TOKENS, cache.shape[3] * cache.shape[4], dtype=cache.dtype)
    for slot, rows in enumerate(cache.flatten(3).transpose(1, 2)):
        start = first_row(slot, blocks_per_seq)
        flat[:, start : start + rows.shape[1]] = rows
    full = {
        name: torch.cat([inputs[name]] * 2, dim=-1).to(cache.dtype).view(1, num_tokens, 1, -1)
        for name in ("cos", "sin")
    }
    return {
        "delta": inputs["delta"],
        "residual": inputs["residual"],
        **full,
        "write_at": torch.tensor(write_at, dtype=torch.int32).unsqueeze(1),
        "query_end": torch.tensor(query_end),
        "kv_len": torch.tensor(kv_len),
        "block_table": torch.tensor(tables, dtype=torch.int32),
        "causal_mask": torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.int8).triu(1),
        "k_cache": flat[0],
        "v_cache": flat[1],
    }


def halved_npu_inputs(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of a layer on two halves of the step, as runtime/ops/npu.py describes them."""
    num_tokens = len(inputs["write_at"])
    first = num_tokens - num_tokens // 2
    cut = ("delta", "residual")
    halves = {f"{name}_{half}": part for name in cut for half, part in enumerate(inputs[name].split(first))}
    ends = inputs["query_end"].tolist()
    begins = [0, *ends[:-1]]
    after_cut = [max(0, end - max(begin, first)) for begin, end in zip(begins, ends, strict=True)]
    return {
        **{name: value for name, value in inputs.items() if name not in (*cut, "query_end", "kv_len")},
        **halves,
        "query_end_0": torch.tensor([min(end, first) for end in ends]),
        "query_end_1": torch.tensor([max(end - first, 0) for end in ends]),
        "kv_len_0": inputs["kv_len"] - torch.tensor(after_cut),
        "kv_len_1": inputs["kv_len"],
    }


def first_row(slot: int, blocks_per_seq: int) -> int:
    return (1 + slot * blocks_per_seq) * BLOCK_TOKENS


def _rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    scale = 1 / (x.double().pow(2).mean(-1, keepdim=True) + epsilon).sqrt()
    return (x * scale * gamma).to(x.dtype), scale.float()


def _add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    total = x1 + x2
    return *_rms_norm(total, gamma, epsilon), total


def _mm_all_reduce_add_rms_norm(
    x1: Tensor, x2: Tensor, residual: Tensor, gamma: Tensor, hcom: str, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Of one rank."""
    total = (x1 @ x2.t()).view(residual.shape) + residual
    return total, _rms_norm(total, gamma, epsilon)[0]


def _swiglu(x: Tensor, dim: int = -1) -> Tensor:
    first, second = x.chunk(2, dim)
    return first / (1 + (-first).exp()) * second


def _rotary_mul(x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half") -> Tensor:
    assert rotary_mode == "half"
    first, second = x.chunk(2, -1)
    return x * r1 + torch.cat((-second, first), -1) * r2


def _scatter_nd_update(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    assert indices.shape == (updates.shape[0], 1)
    for row, at in enumerate(indices[:, 0].tolist()):
        x[at] = updates[row]
    return x


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor,
    actual_seq_lengths: Tensor,
    actual_seq_lengths_kv: Tensor,
    block_table: Tensor,
    num_heads: int,
    scale: float,
    input_layout: str,
    num_key_value_heads: int,
    sparse_mode: int,
    block_size: int,
    pre_tokens: int = 2**31 - 1,
    next_tokens: int = 2**31 - 1,
) -> tuple[Tensor, Tensor]:
    assert input_layout == "TND" and key.shape[1] == block_size and atten_mask.sum() == MASK_SIZE * (MASK_SIZE - 1) // 2
    assert sparse_mode in (3, 4) and query.shape[1] == num_heads and actual_seq_lengths[-1] == query.shape[0]
    out, begin = torch.empty_like(query), 0
    for row, end in enumerate(actual_seq_lengths.tolist()):
        length = int(actual_seq_lengths_kv[row])
        keys, values = (
            cache[block_table[row].long()].flatten(0, 1)[:length].unflatten(-1, (num_key_value_heads, -1))
            for cache in (key, value)
        )
        for token in range(begin, end):
            at = length - (end - token)
            first = max(0, at - pre_tokens) if sparse_mode == 4 else 0
            last = min(length - 1, at + next_tokens) if sparse_mode == 4 else at
            for head in range(num_heads):
                group = head * num_key_value_heads // num_heads
                scores = (keys[first : last + 1, group].float() @ query[token, head].float()) * scale
                out[token, head] = scores.softmax(0) @ values[first : last + 1, group].float()
        begin = end
    return out, query.new_empty(0)


_OPERATORS: dict[str, Callable[..., Any]] = {
    "npu::npu_rms_norm": _rms_norm,
    "npu::npu_add_rms_norm": _add_rms_norm,
    "npu::npu_swiglu": _swiglu,
    "npu::npu_linear": torch.nn.functional.linear,
    "npu::npu_rotary_mul": _rotary_mul,
    "npu::npu_scatter_nd_update_": _scatter_nd_update,
    "npu::npu_mm_all_reduce_base": lambda x1, x2, hcom: x1 @ x2,
    "xllm_npu::mm_all_reduce_add_rms_norm": _mm_all_reduce_add_rms_norm,
    "air::npu_fused_infer_attention_score": _fused_attention,
    "air::scope_enter": lambda *_: None,
    "air::scope_exit": lambda *_: None,
}
