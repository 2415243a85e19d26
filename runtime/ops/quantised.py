"""Weight formats of the quantised products: how a weight is rounded, packed and read back.

**int8**: one scale per output channel, symmetric. values [N, C] in -127..127, scale [N] float32;
weight = value * scale.

**int4**: one scale per ``group_size`` elements of the reduction axis, symmetric as in GGUF's Q4_0: the scale takes the
sign that lets the element of largest magnitude become about -8, so all sixteen codes are used. values [N, C] in -8..7,
scale [N, C / group_size] bfloat16.

Packed, in blocks of 32 columns like ``pack_weight``, 4 bytes per column and step, so that one layout is streamed by
the matrix-vector kernel and tiled by the matrix-matrix kernel; N is padded with zeros to whole blocks:

- int8 [N/32, C/4, 32, 4] int8: four consecutive elements of the reduction axis (the operand order of the 8-bit dot
  products), C padded with zeros.
- int4 [N/32, C/8, 32, 4] uint8: eight consecutive elements as code + 8. The even ones are the nibbles of the low two
  bytes, lowest first, the odd ones those of the high two: two shifts give a pair for the bfloat16 dot product, and
  one mask the operand of an 8-bit one, of elements 0, 4, 1, 5 or 2, 6, 3, 7.
- int4 scale [N/32, C/group_size, 32].

Products are sums of x times values, multiplied by the scale of the channel or group: no weight is rounded once more.
Dynamic products round x to int8, one scale per row, and are the same sums of integers.
Only AMX tiles, which keep one sum for all groups, multiply by bfloat16(value * scale) for int4.

A checkpoint that is quantised already brings values, scales and zero points of its own:
weight = (value - zero) * scale. int8 with one scale per row and no zero points is as above. Of all else scales and zero
points of the groups, of int8 too, are packed like int4's scales; scales are float32: no float16 scale is rounded.

Rows are rounded each by itself and groups each by itself: a slice of a quantised weight is the quantised slice.
"""

import torch
from torch import Tensor

BLOCK_COLUMNS = 32

_MAX_INVERSE = 3e38
_SEARCH_FACTORS = (1.0, -1.0, *(sign * (0.8 + 0.05 * step) for step in (1, 2, 3, 5, 6, 7) for sign in (1, -1)))
# Elements searched at a time: they stay in cache.
_SEARCH_ELEMENTS = 1 << 18
_EVEN_FIRST = (0, 2, 4, 6, 1, 3, 5, 7)


def quantise_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, C] float -> values [N, C] int8, scale [N] float32, the error at most half a scale."""
    weight = weight.float()
    largest = weight.abs().amax(1)
    # The bound keeps a channel of denormals from becoming inf * 0.
    inverse = torch.where(largest > 0, 127 / largest, 0.0).clamp(max=_MAX_INVERSE)
    return (weight * inverse.unsqueeze(1)).round().to(torch.int8), largest / 127


def quantise_int4(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """[N, C] float -> values [N, C] int8 in -8..7, scale [N, C / group_size] bfloat16.

    Raises ValueError when C is no multiple of the group.
    """
    rows, columns = weight.shape
    if columns % group_size:
        raise ValueError(f"a reduction axis of {columns} is no multiple of the group size {group_size}")
    step = max(1, _SEARCH_ELEMENTS // columns)
    parts = [_round_groups(part.float().reshape(-1, group_size)) for part in weight.split(step)]
    values = torch.cat([part for part, _ in parts]).view(rows, columns)
    return values, torch.cat([scale for _, scale in parts]).view(rows, -1)


def _round_groups(groups: Tensor) -> tuple[Tensor, Tensor]:
    """[groups, G] -> values int8, scale [groups] bfloat16.

    Of a few scales near the one that maps the largest element to -8, of either sign, the one with the least squared
    error: on models/demo/demo-code this takes 30% off what int4 costs in bits per byte.

    The values are rounded against the scale as it is stored, so its own rounding is no further error.
    """
    largest = groups.gather(1, groups.abs().argmax(1, keepdim=True)) / -8
    best_scale, best_error = largest.to(torch.bfloat16), torch.full_like(largest, torch.inf)
    for factor in _SEARCH_FACTORS:
        scale = (largest * factor).to(torch.bfloat16)
        error = _int4_values(groups, scale).mul_(scale).sub_(groups).square_().sum(1, keepdim=True)
        is_better = error < best_error
        best_scale, best_error = torch.where(is_better, scale, best_scale), torch.where(is_better, error, best_error)
    return _int4_values(groups, best_scale).to(torch.int8), best_scale.squeeze(1)


def _int4_values(groups: Tensor, scale: Tensor) -> Tensor:
    inverse = torch.where(scale != 0, 1 / scale.float(), 0.0).clamp(-_MAX_INVERSE, _MAX_INVERSE)
    return (groups * inverse).round_().clamp_(-8, 7)


def pack_int8(values: Tensor) -> Tensor:
    """[N, C] int8 -> [N/32, C/4, 32, 4] int8."""
    return _blocks(values, 4).permute(0, 2, 1, 3).contiguous()


def unpack_int8(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """Inverse of pack_int8: [out_features, in_features]."""
    dense = packed.permute(0, 2, 1, 3).reshape(packed.shape[0] * BLOCK_COLUMNS, -1)
    return dense[:out_features, :in_features]


def pack_int4(values: Tensor) -> Tensor:
    """[N, C] int8 in -8..7 -> [N/32, C/8, 32, 4] uint8; C is a multiple of 8."""
    codes = (_blocks(values, 8).permute(0, 2, 1, 3)[..., _EVEN_FIRST].to(torch.uint8) + 8) & 15
    return (codes[..., 0::2] | codes[..., 1::2] << 4).contiguous()


def unpack_int4(packed: Tensor, out_features: int) -> Tensor:
    """Inverse of pack_int4: [out_features, C] int8 in -8..7."""
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).to(torch.int8) - 8
    order = sorted(range(8), key=_EVEN_FIRST.__getitem__)
    return codes[..., order].permute(0, 2, 1, 3).reshape(packed.shape[0] * BLOCK_COLUMNS, -1)[:out_features]


def pack_scale(scale: Tensor) -> Tensor:
    """[N, groups] -> [N/32, groups, 32]."""
    return _blocks(scale, 1).squeeze(-1).transpose(1, 2).contiguous()


def unpack_scale(packed: Tensor, out_features: int) -> Tensor:
    """Inverse of pack_scale: [out_features, groups]."""
    return packed.transpose(1, 2).reshape(packed.shape[0] * BLOCK_COLUMNS, -1)[:out_features]


def quantise_packed(weight: Tensor, kind: str, group_size: int) -> tuple[Tensor, Tensor]:
    """Packed values and scales of a [N, C] weight; ``kind`` is int8 (whole rows share a scale) or int4."""
    if kind == "int8":
        values, scale = quantise_int8(weight)
        return pack_int8(values), scale
    values, scale = quantise_int4(weight, group_size)
    return pack_int4(values), pack_scale(scale)


def quantise_packed_meta(weight: Tensor, kind: str, group_size: int) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of quantise_packed."""
    rows, columns = weight.shape
    blocks = -(-rows // BLOCK_COLUMNS)
    if kind == "int8":
        values = weight.new_empty(blocks, -(-columns // 4), BLOCK_COLUMNS, 4, dtype=torch.int8)
        return values, weight.new_empty(rows, dtype=torch.float32)
    values = weight.new_empty(blocks, columns // 8, BLOCK_COLUMNS, 4, dtype=torch.uint8)
    return values, weight.new_empty(blocks, columns // group_size, BLOCK_COLUMNS, dtype=torch.bfloat16)


def stored_packed(values: Tensor, scale: Tensor, zero: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """values [N, C] int8 in the range of ``kind``, scale and zero [N, groups] -> packed values, scale float32, zero
    bfloat16, in which every zero point is exact."""
    packed = pack_int4(values) if kind == "int4" else pack_int8(values)
    return packed, pack_scale(scale.float()), pack_scale(zero.to(torch.bfloat16))


def stored_meta(weight: Tensor, kind: str, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes of stored_packed for a [N, C] weight; a group of 0 is the whole row."""
    rows, columns = weight.shape
    blocks, groups = -(-rows // BLOCK_COLUMNS), columns // (group_size or columns)
    per_step, dtype = (8, torch.uint8) if kind == "int4" else (4, torch.int8)
    return (
        weight.new_empty(blocks, columns // per_step, BLOCK_COLUMNS, 4, dtype=dtype),
        weight.new_empty(blocks, groups, BLOCK_COLUMNS, dtype=torch.float32),
        weight.new_empty(blocks, groups, BLOCK_COLUMNS, dtype=torch.bfloat16),
    )


def _blocks(matrix: Tensor, unit: int) -> Tensor:
    """[N, C] -> [N/32, 32, C/unit, unit], both axes padded with zeros."""
    rows, columns = matrix.shape
    blocks, units = -(-rows // BLOCK_COLUMNS), -(-columns // unit)
    padded = matrix.new_zeros(blocks * BLOCK_COLUMNS, units * unit)
    padded[:rows, :columns] = matrix
    return padded.view(blocks, BLOCK_COLUMNS, units, unit)
