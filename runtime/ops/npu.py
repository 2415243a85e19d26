"""The Ascend operators that lowered graphs call: torch_npu's schemas and their shape functions, without torch_npu.

A graph for the NPU names ``torch.ops.npu.*`` and ``torch.ops.air.*``. Where torch_npu is loaded those are its own
operators. Passes run where it is not: ``declare_operators`` then defines the same schemas, with shapes but no kernels,
so that graphs can be rewritten, verified and printed on any machine. Schemas are those of torch_npu 2.13; a test in the
environment that has it compares them.

What a region for the NPU takes in place of the step metadata of the package, with the letters of the package and
N rows of the flat KV cache, B blocks a sequence can own:

- ``write_at`` [T, 1] int32: the row of the cache that each token's key and value go to. Rows that belong to no
  sequence (padding) go to block 0, which no sequence owns.
- ``query_end`` [S] int64: cumulative token counts without the leading zero; the last one is T: padding rows are a
  sequence of their own. ``kv_len`` [S] int64: tokens in the cache after this step's are written.
- ``block_table`` [S, B] int32: the blocks of each sequence in order.
- ``causal_mask`` [2048, 2048] int8: ones above the diagonal; what the attention operator wants of any length.
- ``k_cache``, ``v_cache`` [N, K*D]: one row per token. Two tensors, because a slice of one would be copied whole.
- ``cos``, ``sin`` [1, T, 1, D] in the model's dtype, each half repeated, computed once per step by the embed region.

A layer on two halves of a step takes ``query_end`` and ``kv_len`` of each half (``query_end_0``, ...): half 0 sees none
of the later tokens, half 1 all of them. Every sequence is in both, with no tokens where the cut leaves none.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.node import has_side_effect
from torch.library import Library

BLOCK_TOKENS = 128
"""Rows of one KV block: what the attention operator takes for every head size and dtype."""
MASK_SIZE = 2048

SCHEMAS: dict[str, str] = {
    "npu::npu_rms_norm": "(Tensor input, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)",
    "npu::npu_add_rms_norm": ("(Tensor x1, Tensor x2, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor, Tensor)"),
    "npu::npu_swiglu": "(Tensor input, int dim=-1) -> Tensor",
    "npu::npu_linear": "(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor",
    "npu::npu_rotary_mul": (
        '(Tensor input, Tensor r1, Tensor r2, str rotary_mode="half", Tensor? rotate=None) -> Tensor'
    ),
    "npu::npu_scatter_nd_update_": "(Tensor(a!) input, Tensor indices, Tensor updates) -> Tensor(a!)",
    "npu::npu_mm_all_reduce_base": (
        '(Tensor x1, Tensor x2, str hcom, *, str reduce_op="sum", Tensor? bias=None, Tensor? antiquant_scale=None,'
        " Tensor? antiquant_offset=None, Tensor? x3=None, Tensor? dequant_scale=None, Tensor? pertoken_scale=None,"
        " Tensor? comm_quant_scale_1=None, Tensor? comm_quant_scale_2=None, int antiquant_group_size=0,"
        " int comm_turn=0, int[]? group_sizes=None, int? y_dtype=None, int? x1_dtype=None, int? x2_dtype=None,"
        " int? dequant_scale_dtype=None, int? pertoken_scale_dtype=None, int comm_quant_mode=0,"
        " str? comm_mode=None) -> Tensor"
    ),
    # TorchAir's form of the attention operator: the lengths are tensors. torch_npu's own takes them as Python ints,
    # which a graph of fixed shapes would hold as constants.
    "air::npu_fused_infer_attention_score": (
        "(Tensor query, Tensor key, Tensor value, *, Tensor? pse_shift=None, Tensor? atten_mask=None,"
        " Tensor? actual_seq_lengths=None, Tensor? actual_seq_lengths_kv=None, Tensor? dequant_scale1=None,"
        " Tensor? quant_scale1=None, Tensor? dequant_scale2=None, Tensor? quant_scale2=None,"
        " Tensor? quant_offset2=None, Tensor? antiquant_scale=None, Tensor? antiquant_offset=None,"
        " Tensor? key_antiquant_scale=None, Tensor? key_antiquant_offset=None, Tensor? value_antiquant_scale=None,"
        " Tensor? value_antiquant_offset=None, Tensor? block_table=None, Tensor? query_padding_size=None,"
        " Tensor? kv_padding_size=None, Tensor? key_shared_prefix=None, Tensor? value_shared_prefix=None,"
        " Tensor? actual_shared_prefix_len=None, Tensor? query_rope=None, Tensor? key_rope=None,"
        " Tensor? key_rope_antiquant_scale=None, int num_heads=1, float scale=1., int pre_tokens=2147483647,"
        ' int next_tokens=2147483647, str input_layout="BSH", int num_key_value_heads=0, int sparse_mode=0,'
        " int inner_precise=0, int block_size=0, int antiquant_mode=0, int key_antiquant_mode=0,"
        " int value_antiquant_mode=0, bool softmax_lse_flag=False) -> (Tensor, Tensor)"
    ),
    # GE's operator, which torch_npu has no name for: compile_region.py converts it. x2 is a weight [N, C], residual
    # [1, T, N]. Returns x @ x2.t() summed over the ranks plus residual, and its norm.
    "xllm_npu::mm_all_reduce_add_rms_norm": (
        "(Tensor x1, Tensor x2, Tensor residual, Tensor gamma, str hcom, float epsilon=1e-06) -> (Tensor, Tensor)"
    ),
    # Attributes that TorchAir puts on every GE operator between the two calls: torchair.scope.npu_stream_switch and
    # torchair.scope.limit_core_num are context managers around them.
    "air::scope_enter": "(str[] keys, str[] values, bool need_execute=False) -> None",
    "air::scope_exit": "(bool need_execute=False) -> None",
}


def _rms_norm_meta(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    return input.new_empty(input.shape), _statistics(input, gamma)


def _add_rms_norm_meta(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    return x1.new_empty(x1.shape), _statistics(x1, gamma), x1.new_empty(x1.shape)


def _statistics(x: Tensor, gamma: Tensor) -> Tensor:
    """1/rms of each row, with the normed axes kept as ones."""
    return x.new_empty(*x.shape[: x.dim() - gamma.dim()], *([1] * gamma.dim()), dtype=torch.float32)


def _swiglu_meta(input: Tensor, dim: int = -1) -> Tensor:
    shape = list(input.shape)
    shape[dim] //= 2
    return input.new_empty(shape)


def _linear_meta(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


def _rotary_mul_meta(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    return input.new_empty(input.shape)


def _scatter_nd_update_meta(input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    return input


def _mm_all_reduce_base_meta(x1: Tensor, x2: Tensor, hcom: str, **_options: object) -> Tensor:
    return x1.new_empty(*x1.shape[:-1], x2.shape[1])


def _mm_all_reduce_add_rms_norm_meta(
    x1: Tensor, x2: Tensor, residual: Tensor, gamma: Tensor, hcom: str, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor]:
    return residual.new_empty(residual.shape), residual.new_empty(residual.shape)


def _fused_infer_attention_score_meta(
    query: Tensor, key: Tensor, value: Tensor, **_options: object
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(0, dtype=torch.float32)


def _scope_meta(*_arguments: object) -> None:
    return None


_SHAPE_FUNCTIONS: dict[str, Callable[..., object]] = {
    "npu::npu_rms_norm": _rms_norm_meta,
    "npu::npu_add_rms_norm": _add_rms_norm_meta,
    "npu::npu_swiglu": _swiglu_meta,
    "npu::npu_linear": _linear_meta,
    "npu::npu_rotary_mul": _rotary_mul_meta,
    "npu::npu_scatter_nd_update_": _scatter_nd_update_meta,
    "npu::npu_mm_all_reduce_base": _mm_all_reduce_base_meta,
    "xllm_npu::mm_all_reduce_add_rms_norm": _mm_all_reduce_add_rms_norm_meta,
    "air::npu_fused_infer_attention_score": _fused_infer_attention_score_meta,
    "air::scope_enter": _scope_meta,
    "air::scope_exit": _scope_meta,
}

# Held for the life of the process: a Library that is collected takes its operators with it.
_LIBRARIES: list[Library] = []


def declare_operators() -> None:
    """Define what is not defined yet. Call it before naming an operator; torch_npu must be loaded before, if at all."""
    for qualified, schema in SCHEMAS.items():
        namespace, name = qualified.split("::")
        if hasattr(getattr(torch.ops, namespace), name):
            continue
        library = Library(namespace, "FRAGMENT")
        _LIBRARIES.append(library)
        library.define(name + schema)
        torch.library.register_fake(qualified, _SHAPE_FUNCTIONS[qualified], lib=library)
    has_side_effect(torch.ops.air.scope_enter.default)
    has_side_effect(torch.ops.air.scope_exit.default)
