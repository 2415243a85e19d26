"""What each demo model is: architecture, shape and training hyper-parameters. A new model is a new row."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel

from xllm_compile.models.demo.corpus import END_OF_TEXT, IM_END
from xllm_compile.models.demo.tokenizer import SPECIAL_TOKENS, VOCABULARY_SIZE

EOS_TOKEN_IDS = [SPECIAL_TOKENS.index(IM_END), SPECIAL_TOKENS.index(END_OF_TEXT)]
PAD_TOKEN_ID = SPECIAL_TOKENS.index(END_OF_TEXT)


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """Hyper-parameters of one run. ``phases`` are (share of the run after which it starts, sequence length)."""

    minutes: float
    tokens_per_batch: int
    matrix_lr: float
    other_lr: float
    warmup_share: float = 0.02
    weight_decay: float = 0.05
    gradient_clip: float = 1.0
    phases: tuple[tuple[float, int], ...] = ((0.0, 512), (0.85, 2048))

    def sequence_length(self, progress: float) -> int:
        """The sequence length in tokens at ``progress`` in 0..1."""
        return [length for start, length in self.phases if progress >= start][-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One demo model: names of the transformers classes, the config's arguments and how to train it."""

    name: str
    summary: str
    config_class: str
    model_class: str
    config: Mapping[str, Any]
    training: Training

    def build_config(self) -> PretrainedConfig:
        config_class = getattr(transformers, self.config_class)
        config: PretrainedConfig = config_class(
            vocab_size=VOCABULARY_SIZE,
            bos_token_id=None,
            eos_token_id=EOS_TOKEN_IDS,
            pad_token_id=PAD_TOKEN_ID,
            **self.config,
        )
        return config

    def build_model(self) -> PreTrainedModel:
        model: PreTrainedModel = getattr(transformers, self.model_class)(self.build_config())
        return model


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="demo-code",
            summary="A small dense Qwen3 that completes Python and answers requests for Python functions.",
            config_class="Qwen3Config",
            model_class="Qwen3ForCausalLM",
            config={
                "hidden_size": 288,
                "intermediate_size": 768,
                "num_hidden_layers": 6,
                "num_attention_heads": 6,
                "num_key_value_heads": 3,
                "head_dim": 64,
                "max_position_embeddings": 2048,
                "tie_word_embeddings": True,
            },
            training=Training(minutes=50, tokens_per_batch=4096, matrix_lr=5e-3, other_lr=4e-3),
        ),
        Recipe(
            name="demo-draft",
            summary="A very small Qwen3 that drafts tokens for demo-code in speculative decoding.",
            config_class="Qwen3Config",
            model_class="Qwen3ForCausalLM",
            config={
                "hidden_size": 128,
                "intermediate_size": 320,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 32,
                "max_position_embeddings": 2048,
                "tie_word_embeddings": True,
            },
            training=Training(minutes=10, tokens_per_batch=4096, matrix_lr=6e-3, other_lr=5e-3),
        ),
    )
}
