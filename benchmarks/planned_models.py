"""Models that are planned on paper: captured and passed as a build would, but never given weights or compiled."""

from typing import Any

import torch

from xllm_compile.capture import capture_region
from xllm_compile.graph_passes.pipeline import cpu_pipeline, run_passes
from xllm_compile.graph_passes.region import RegionGraph
from xllm_compile.models.decoder import EMBED_WEIGHT, build_regions
from xllm_compile.models.registry import read_model_config

# config.json of Qwen/Qwen3-8B and Qwen/Qwen3-0.6B: what decides the work.
_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
    "attention_bias": False,
}
PLANNED_MODELS: dict[str, dict[str, Any]] = {
    "qwen3-8b": {
        **_QWEN3,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "qwen3-0.6b": {
        **_QWEN3,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
}


def planned_regions(name: str, dtype: torch.dtype = torch.bfloat16) -> list[tuple[RegionGraph, int]]:
    """The regions after the passes, each with how often a step runs it."""
    config = read_model_config(PLANNED_MODELS[name])
    tied = frozenset({EMBED_WEIGHT}) if config.tie_word_embeddings else frozenset[str]()
    found = []
    for region in build_regions(config):
        graph = capture_region(region, dtype)
        run_passes(graph, cpu_pipeline(tied_weights=tied))
        found.append((graph, max(1, len(region.layers))))
    return found
