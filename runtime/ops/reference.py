"""Plain-torch reference of every operator, and its shape function (``*_meta``). Shapes are explained in the package."""

import itertools

import torch
from torch import Tensor

from xllm_compile.runtime.ops import quantised
from xllm_compile.runtime.ops.kv_rows import read_rows, round_rows

PACK_COLUMNS = 32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def rms_norm_meta(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps), total


def add_rms_norm_meta(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def silu_mul_meta(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    x32 = x.float()
    first, second, rest = x32[..., :half], x32[..., half : 2 * half], x32[..., 2 * half :]
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * c - second * s, second * c + first * s, rest), dim=-1).to(x.dtype)


def rope_meta(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def kv_write(k: Tensor, v: Tensor, kv_cache: Tensor, positions: Tensor, seq_start: Tensor, slot: Tensor) -> None:
    if kv_cache.dtype == torch.int8:
        k, v = round_rows(k), round_rows(v)
    starts = seq_start.tolist()
    for row, (begin, end) in enumerate(itertools.pairwise(starts)):
        if end > begin:
            at = positions[begin:end].long()
            kv_cache[int(slot[row]), at, 0] = k[begin:end]
            kv_cache[int(slot[row]), at, 1] = v[begin:end]


def kv_write_meta(k: Tensor, v: Tensor, kv_cache: Tensor, positions: Tensor, seq_start: Tensor, slot: Tensor) -> None:
    return None


def attention(
    q: Tensor,
    kv_cache: Tensor,
    seq_start: Tensor,
    context_len: Tensor,
    slot: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    out = torch.zeros_like(q)
    groups = q.shape[1] // kv_cache.shape[3]
    starts = seq_start.tolist()
    for row, (begin, end) in enumerate(itertools.pairwise(starts)):
        if end == begin:
            continue
        total = int(context_len[row])
        cached = read_rows(kv_cache[int(slot[row]), :total]).repeat_interleave(groups, dim=2)
        keys, values = cached[:, 0], cached[:, 1]
        scores = torch.einsum("thd,mhd->htm", q[begin:end].float(), keys) * scale
        query_at = torch.arange(total - (end - begin), total).unsqueeze(1)
        key_at = torch.arange(total).unsqueeze(0)
        hidden = key_at > query_at
        if window > 0:
            hidden |= key_at <= query_at - window
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[begin:end] = torch.einsum("htm,mhd->thd", weights, values).to(q.dtype)
    return out


def attention_meta(
    q: Tensor,
    kv_cache: Tensor,
    seq_start: Tensor,
    context_len: Tensor,
    slot: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    return q.new_empty(q.shape)


def qkv_rope_write(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    kv_cache: Tensor,
    positions: Tensor,
    seq_start: Tensor,
    slot: Tensor,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
) -> Tensor:
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, -1)
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if q_norm is not None:
        q = rms_norm(q, q_norm, eps)
    if k_norm is not None:
        k = rms_norm(k, k_norm, eps)
    kv_write(rope(k, cos, sin), v, kv_cache, positions, seq_start, slot)
    return rope(q, cos, sin)


def qkv_rope_write_meta(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    kv_cache: Tensor,
    positions: Tensor,
    seq_start: Tensor,
    slot: Tensor,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
) -> Tensor:
    head_dim = qkv.shape[1] // (num_heads + 2 * num_kv_heads)
    return qkv.new_empty(qkv.shape[0], num_heads, head_dim)


def pack_weight(weight: Tensor) -> Tensor:
    """[N, C] float32 or bfloat16 -> the packed layout described in the package."""
    rows, columns = weight.shape
    pair = 2 if weight.dtype == torch.bfloat16 else 1
    blocks = -(-rows // PACK_COLUMNS)
    groups = -(-columns // pair)
    padded = weight.new_zeros(blocks * PACK_COLUMNS, groups * pair)
    padded[:rows, :columns] = weight
    packed = padded.view(blocks, PACK_COLUMNS, groups, pair).permute(0, 2, 1, 3).contiguous()
    return packed if pair == 2 else packed.squeeze(-1)


def unpack_weight(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """Inverse of pack_weight: [out_features, in_features]."""
    full = packed if packed.dim() == 4 else packed.unsqueeze(-1)
    dense = full.permute(0, 2, 1, 3).reshape(full.shape[0] * PACK_COLUMNS, -1)
    return dense[:out_features, :in_features]


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, f32_out: bool) -> Tensor:
    dense = unpack_weight(weight, out_features, x.shape[1])
    y = x.float() @ dense.float().T
    if bias is not None:
        y += bias.float()
    return y if f32_out else y.to(x.dtype)


def packed_linear_meta(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, f32_out: bool) -> Tensor:
    return x.new_empty(x.shape[0], out_features, dtype=torch.float32 if f32_out else x.dtype)


def packed_embedding(token_ids: Tensor, weight: Tensor, columns: int) -> Tensor:
    ids = token_ids.long()
    rows = weight[ids // PACK_COLUMNS, :, ids % PACK_COLUMNS]
    return rows.reshape(ids.shape[0], -1)[:, :columns].contiguous()


def packed_embedding_meta(token_ids: Tensor, weight: Tensor, columns: int) -> Tensor:
    return weight.new_empty(token_ids.shape[0], columns)


def int8_embedding(token_ids: Tensor, weight: Tensor, scale: Tensor, columns: int, f32_out: bool) -> Tensor:
    ids = token_ids.long()
    values = weight[ids // PACK_COLUMNS, :, ids % PACK_COLUMNS].reshape(ids.shape[0], -1)[:, :columns]
    return (values.float() * scale[ids, None]).to(torch.float32 if f32_out else torch.bfloat16)


def int8_embedding_meta(token_ids: Tensor, weight: Tensor, scale: Tensor, columns: int, f32_out: bool) -> Tensor:
    return scale.new_empty(token_ids.shape[0], columns, dtype=torch.float32 if f32_out else torch.bfloat16)


def int8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out_features: int, f32_out: bool
) -> Tensor:
    values = quantised.unpack_int8(weight, out_features, x.shape[1])
    y = x.float() @ values.float().T * scale
    return _with_bias(y, bias).to(torch.float32 if f32_out else x.dtype)


def int8_linear_meta(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out_features: int, f32_out: bool
) -> Tensor:
    return packed_linear_meta(x, weight, bias, out_features, f32_out)


def int4_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out_features: int, f32_out: bool
) -> Tensor:
    values = quantised.unpack_int4(weight, out_features)
    steps = quantised.unpack_scale(scale, out_features).float()
    dense = values.float() * steps.repeat_interleave(values.shape[1] // steps.shape[1], dim=1)
    y = x.float() @ dense.T
    return _with_bias(y, bias).to(torch.float32 if f32_out else x.dtype)


def int4_linear_meta(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out_features: int, f32_out: bool
) -> Tensor:
    return packed_linear_meta(x, weight, bias, out_features, f32_out)


def int8_zero_linear(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, out_features: int, f32_out: bool
) -> Tensor:
    return _zero_linear(x, quantised.unpack_int8(weight, out_features, x.shape[1]), scale, zero, bias, f32_out)


def int8_zero_linear_meta(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, out_features: int, f32_out: bool
) -> Tensor:
    return packed_linear_meta(x, weight, bias, out_features, f32_out)


def int4_zero_linear(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, out_features: int, f32_out: bool
) -> Tensor:
    return _zero_linear(x, quantised.unpack_int4(weight, out_features), scale, zero, bias, f32_out)


def int4_zero_linear_meta(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, out_features: int, f32_out: bool
) -> Tensor:
    return packed_linear_meta(x, weight, bias, out_features, f32_out)


def _zero_linear(x: Tensor, values: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, f32_out: bool) -> Tensor:
    out_features = len(values)
    steps, zeros = (quantised.unpack_scale(part, out_features).float() for part in (scale, zero))
    group_size = values.shape[1] // steps.shape[1]
    dense = (values.float() - zeros.repeat_interleave(group_size, dim=1)) * steps.repeat_interleave(group_size, dim=1)
    y = x.float() @ dense.T
    return _with_bias(y, bias).to(torch.float32 if f32_out else x.dtype)


def int8_dynamic_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out_features: int, f32_out: bool
) -> Tensor:
    codes, row_scale = _rounded_rows(x)
    # Exact in float64: below 2^53 for any width.
    sums = codes.double() @ quantised.unpack_int8(weight, out_features, x.shape[1]).double().T
    y = sums.float() * row_scale * scale
    return _with_bias(y, bias).to(torch.float32 if f32_out else x.dtype)


def int8_dynamic_linear_meta(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out_features: int, f32_out: bool
) -> Tensor:
    return packed_linear_meta(x, weight, bias, out_features, f32_out)


def int4_dynamic_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out_features: int, f32_out: bool
) -> Tensor:
    codes, row_scale = _rounded_rows(x)
    y = int4_linear(codes, weight, scale, None, out_features, True) * row_scale
    return _with_bias(y, bias).to(torch.float32 if f32_out else x.dtype)


def int4_dynamic_linear_meta(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out_features: int, f32_out: bool
) -> Tensor:
    return packed_linear_meta(x, weight, bias, out_features, f32_out)


def _rounded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, C] as codes [T, C] of at most 127 in magnitude and their scale [T, 1], both float32; a row that is not
    finite has codes of zero and a scale that is not finite."""
    x32 = x.float()
    largest = x32.abs().amax(1, keepdim=True)
    # A division in float32: "127 / largest" would multiply by a rounded reciprocal and move ties.
    inverse = torch.where(largest > 0, torch.full_like(largest, 127) / largest, 0.0).clamp(max=3e38)
    return (x32 * inverse).round().nan_to_num(0.0), largest / 127


def _with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias.float()
