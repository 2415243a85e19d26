"""Rows of the KV cache: what the key or the value of one token and one head takes.

A row of a floating cache is the head's elements. A row of an int8 cache is one code per element, at most 127 in
magnitude, and behind them the float32 scale that the codes are multiplied by: largest magnitude / 127. Rows are rounded
one by one, as they are written, so no calibration is needed and a token's bytes depend on nothing but its KV.
"""

import torch
from torch import Tensor

SCALE_BYTES = 4


def row_width(head_dim: int, *, is_int8: bool) -> int:
    """Elements of a row."""
    return head_dim + SCALE_BYTES if is_int8 else head_dim


def round_rows(heads: Tensor) -> Tensor:
    """[..., D] -> int8 [..., D + 4]. A row with a NaN or an infinity reads as NaN."""
    x = heads.float()
    largest = x.abs().amax(-1, keepdim=True)
    # A division in float32: "127 / largest" would multiply by a rounded reciprocal and move ties.
    inverse = torch.where(largest > 0, torch.full_like(largest, 127) / largest, 0.0).clamp(max=3e38)
    codes = (x * inverse).round().nan_to_num(0.0).to(torch.int8)
    return torch.cat((codes, (largest / 127).view(torch.int8)), dim=-1)


def read_rows(rows: Tensor) -> Tensor:
    """What the rows of a cache of any dtype mean, in float32."""
    if rows.dtype != torch.int8:
        return rows.float()
    # A copy: scales may lie where float32 must not.
    scale = rows[..., -SCALE_BYTES:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    return rows[..., :-SCALE_BYTES].float() * scale
