"""Llama 2, 3, 3.1, 3.2 and 3.3: plain pre-norm decoder; bias only where config.json asks for it."""

from collections.abc import Mapping
from typing import Any

from xllm_compile.models.config import DecoderConfig, decoder_config

ARCHITECTURES = ("LlamaForCausalLM",)


def read_config(hf: Mapping[str, Any]) -> DecoderConfig:
    bias = bool(hf.get("attention_bias", False))
    # Llama has no sliding window; a checkpoint that carries the key for other tools is read as transformers reads it.
    plain = {**hf, "use_sliding_window": False, "layer_types": None}
    return decoder_config(plain, has_qkv_bias=bias, has_o_bias=bias, has_mlp_bias=bool(hf.get("mlp_bias", False)))
