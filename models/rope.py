"""Rotary frequencies of every scaling variant, and the cos/sin tables of one step.

The formulas and their float32 arithmetic follow transformers.modeling_rope_utils, so tokens match it in float32.
"""

import math

import torch
from torch import Tensor

from xllm_compile.models.config import DecoderConfig, RopeConfig

INV_FREQ = "rope.inv_freq"
EXPONENTS = "rope.exponents"


def rope_constants(config: DecoderConfig) -> dict[str, Tensor]:
    """Tensors of the rotary embedding that are computed, not stored in the checkpoint. float32 [rotary_dim/2]."""
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.int64).float() / config.rotary_dim
    if config.rope.rope_type == "dynamic":
        return {EXPONENTS: exponents}
    return {INV_FREQ: _inv_freq(config, config.rope.rope_theta**exponents)}


def cos_sin(
    config: DecoderConfig, positions: Tensor, rope_len: Tensor, constants: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """cos and sin [T, rotary_dim/2] float32 of each token.

    positions, rope_len [T] int32. "dynamic" rescales the base by the length of the token's own sequence
    (rope_len: its prompt, or its context where that is longer), as transformers does for a batch of one.
    """
    if config.rope.rope_type == "dynamic":
        dim, limit, factor = config.rotary_dim, config.max_position_embeddings, config.rope.factor
        length = rope_len.clamp(min=limit)
        base = config.rope.rope_theta * (factor * length / limit - (factor - 1)) ** (dim / (dim - 2))
        inv_freq = 1.0 / (base.unsqueeze(1) ** constants[EXPONENTS])
    else:
        inv_freq = constants[INV_FREQ]
    angles = positions.float().unsqueeze(1) * inv_freq
    scaling = attention_scaling(config.rope)
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if scaling == 1.0 else (cos * scaling, sin * scaling)


def attention_scaling(rope: RopeConfig) -> float:
    """Factor on cos and sin; other than 1 for yarn only."""
    if rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _inv_freq(config: DecoderConfig, pos_freqs: Tensor) -> Tensor:
    rope = config.rope
    inv_freq = 1.0 / pos_freqs
    if rope.rope_type == "linear":
        return inv_freq / rope.factor
    if rope.rope_type == "llama3":
        return _llama3(rope, inv_freq)
    if rope.rope_type == "yarn":
        return _yarn(config, pos_freqs)
    return inv_freq


def _llama3(rope: RopeConfig, inv_freq: Tensor) -> Tensor:
    """Long wavelengths divided by factor, short ones kept, smooth in between (Llama 3.1)."""
    assert rope.low_freq_factor and rope.high_freq_factor and rope.original_max_position_embeddings
    trained_len, low, high = rope.original_max_position_embeddings, rope.low_freq_factor, rope.high_freq_factor
    wavelen = 2 * math.pi / inv_freq
    scaled = torch.where(wavelen > trained_len / low, inv_freq / rope.factor, inv_freq)
    smooth = (trained_len / wavelen - low) / (high - low)
    blended = (1 - smooth) * scaled / rope.factor + smooth * scaled
    is_medium = (wavelen >= trained_len / high) & (wavelen <= trained_len / low)
    return torch.where(is_medium, blended, scaled)


def _yarn(config: DecoderConfig, pos_freqs: Tensor) -> Tensor:
    """Interpolates low frequencies, extrapolates high ones, a linear ramp between (YaRN, arXiv:2309.00071)."""
    rope, dim = config.rope, config.rotary_dim
    assert rope.original_max_position_embeddings

    def correction_dim(num_rotations: float) -> float:
        ratio = rope.original_max_position_embeddings / (num_rotations * 2 * math.pi)  # type: ignore[operator]
        return dim * math.log(ratio) / (2 * math.log(rope.rope_theta))

    low, high = correction_dim(rope.beta_fast), correction_dim(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = (high - low) or 0.001
    extrapolated = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return 1.0 / (rope.factor * pos_freqs) * (1 - extrapolated) + 1.0 / pos_freqs * extrapolated
