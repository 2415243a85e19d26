"""The operators ``torch.ops.xllm.*``: schema, plain-torch reference and shape function of each.

Importing this module registers them. Models and passes name operators through ``torch.ops.xllm``; a target brings
its own kernels (``native.py`` for the CPU). Without kernels loaded, calling an operator runs the reference, which is
correct in every dtype, slow, and what tests and the eager mode compare with.

Letters in shapes: T packed tokens of a step, S sequences of a step, R rows of logits, E hidden size, F feed-forward
size, H query heads, K key/value heads, D head size, L KV slots, M tokens a slot can hold.

Step metadata, all int32: ``positions`` [T] of each token in its sequence; ``seq_start`` [S+1] cumulative token
counts (rows from seq_start[S] on are padding: they are never written to the cache and attend to nothing, their
output is zero); ``context_len`` [S] tokens in the cache after this step's are written; ``slot`` [S] row of the
KV cache that the sequence owns.

``kv_cache`` is one layer's [L, M, 2, K, D] (index 0 keys, 1 values) with any strides but a contiguous last axis. It has
the dtype of q, k and v, or is int8 [L, M, 2, K, D + 4], whose rows ``kv_rows.py`` explains.

Packed weights (``packed_linear``): columns in blocks of 32, the reduction axis contiguous inside a block, so
that one layout is streamed by the matrix-vector kernel and tiled by the matrix-matrix kernel:
float32 [N/32, C, 32]; bfloat16 [N/32, C/2, 32, 2], pairs along the reduction axis (the operand order of the
bf16 dot-product instructions). N and, for bfloat16, C are padded with zeros to whole blocks and pairs.
Quantised weights are packed alike: ``quantised.py`` says how.
"""

import torch
from torch.library import Library

from xllm_compile.runtime.ops import reference

SCHEMAS: dict[str, str] = {
    # y = x / rms(x) * weight over the last axis, accumulated in float32, rounded once.
    "rms_norm": "(Tensor x, Tensor weight, float eps) -> Tensor",
    # (rms_norm(x + residual) * weight, x + residual); the sum is rounded to x's dtype before it is normed.
    "add_rms_norm": "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    # [T, 2F] -> [T, F]: silu(first half) * second half, in float32, rounded once.
    "silu_mul": "(Tensor gate_up) -> Tensor",
    # Rotary embedding, half-split ("NeoX") order: x [T, heads, D], cos and sin [T, r/2] float32, r <= D rotated.
    "rope": "(Tensor x, Tensor cos, Tensor sin) -> Tensor",
    # Writes k, v [T, K, D] at kv_cache[slot, position], rounded where it is int8.
    "kv_write": "(Tensor k, Tensor v, Tensor(a!) kv_cache, Tensor positions, Tensor seq_start, Tensor slot) -> ()",
    # Causal attention of q [T, H, D] over each sequence's own slot; window > 0 limits it to the last `window` keys.
    "attention": (
        "(Tensor q, Tensor kv_cache, Tensor seq_start, Tensor context_len, Tensor slot, float scale, int window)"
        " -> Tensor"
    ),
    # The fusion of head norm (optional), rope and kv_write on qkv [T, (H+2K)*D]; returns the rotated q [T, H, D].
    "qkv_rope_write": (
        "(Tensor qkv, Tensor? q_norm, Tensor? k_norm, Tensor cos, Tensor sin, Tensor(a!) kv_cache,"
        " Tensor positions, Tensor seq_start, Tensor slot, int num_heads, int num_kv_heads, float eps) -> Tensor"
    ),
    # x [T, C] @ packed weight + bias -> [T, out_features], x's dtype or, with f32_out, float32.
    "packed_linear": "(Tensor x, Tensor weight, Tensor? bias, int out_features, bool f32_out) -> Tensor",
    # packed_linear on int8 values and one float32 scale [N] per output channel. The values are exact in x's dtype, the
    # scale multiplies the float32 sum.
    "int8_linear": ("(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int out_features, bool f32_out) -> Tensor"),
    # packed_linear on int4 values and bfloat16 scales of groups along the reduction axis, which multiply the sums of
    # their groups. A kernel may take bfloat16 x as multiples of 2^-14 of its group's largest magnitude.
    "int4_linear": ("(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int out_features, bool f32_out) -> Tensor"),
    # Products with values in groups along the reduction axis, each with a float32 scale and a bfloat16 zero point:
    # weight = (value - zero) * scale. What checkpoints hold that are quantised already.
    "int8_zero_linear": (
        "(Tensor x, Tensor weight, Tensor scale, Tensor zero, Tensor? bias, int out_features, bool f32_out) -> Tensor"
    ),
    "int4_zero_linear": (
        "(Tensor x, Tensor weight, Tensor scale, Tensor zero, Tensor? bias, int out_features, bool f32_out) -> Tensor"
    ),
    # int8_linear with x rounded to int8 as well, one scale per row of x (largest magnitude / 127), summed in int32.
    "int8_dynamic_linear": (
        "(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int out_features, bool f32_out) -> Tensor"
    ),
    # int4_linear with x rounded likewise, each group summed in int32.
    "int4_dynamic_linear": (
        "(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int out_features, bool f32_out) -> Tensor"
    ),
    # Rows token_ids [T] of a packed [vocab, columns] weight: a tied embedding is held once, in the head's layout.
    "packed_embedding": "(Tensor token_ids, Tensor weight, int columns) -> Tensor",
    # Rows of a weight in the layout of int8_linear times their scales, as float32 or rounded to bfloat16.
    "int8_embedding": "(Tensor token_ids, Tensor weight, Tensor scale, int columns, bool f32_out) -> Tensor",
}

# Held for the life of the process: a Library that is collected takes its operators with it.
LIBRARY = Library("xllm", "DEF")


def _register() -> None:
    for name, schema in SCHEMAS.items():
        LIBRARY.define(name + schema)
        implementation = getattr(reference, name)
        LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"xllm::{name}", getattr(reference, f"{name}_meta"), lib=LIBRARY)


_register()
