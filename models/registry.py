"""From the architecture named in config.json to the family that reads it."""

from collections.abc import Callable, Mapping
from typing import Any

from xllm_compile.models import llama, qwen2, qwen3
from xllm_compile.models.config import DecoderConfig, UnsupportedModelError

FAMILIES: dict[str, Callable[[Mapping[str, Any]], DecoderConfig]] = {
    name: family.read_config for family in (qwen2, qwen3, llama) for name in family.ARCHITECTURES
}


def read_model_config(hf: Mapping[str, Any]) -> DecoderConfig:
    """DecoderConfig of a parsed config.json. Raises UnsupportedModelError listing what is supported."""
    named = hf.get("architectures") or [None]
    read_config = FAMILIES.get(named[0])
    if read_config is None:
        raise UnsupportedModelError(
            f"architecture {named[0]!r} is not supported; supported: {', '.join(sorted(FAMILIES))}"
        )
    return read_config(hf)
