"""Qwen2 and Qwen2.5: bias on q, k and v; sliding window on the upper layers where config.json asks for it."""

from collections.abc import Mapping
from typing import Any

from xllm_compile.models.config import DecoderConfig, decoder_config

ARCHITECTURES = ("Qwen2ForCausalLM",)


def read_config(hf: Mapping[str, Any]) -> DecoderConfig:
    return decoder_config(hf, has_qkv_bias=True)
