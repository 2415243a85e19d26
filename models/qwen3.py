"""Qwen3 (dense): RMSNorm on each head of q and k before the rotary embedding, head size of its own."""

from collections.abc import Mapping
from typing import Any

from xllm_compile.models.config import DecoderConfig, decoder_config

ARCHITECTURES = ("Qwen3ForCausalLM",)


def read_config(hf: Mapping[str, Any]) -> DecoderConfig:
    bias = bool(hf.get("attention_bias", False))
    # transformers defaults head_dim to 128 here, not to hidden_size / num_attention_heads.
    return decoder_config(hf, has_qk_norm=True, has_qkv_bias=bias, has_o_bias=bias, head_dim=hf.get("head_dim") or 128)
