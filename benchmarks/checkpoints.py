"""Checkpoints of real shapes with random weights, and a tokenizer of the real size: speed does not ask what they say.

Both are made from a seed, without transformers or a corpus, into a work directory; a second call finds them there.
"""

import json
import string
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from xllm_compile.atomic_dir import atomic_directory
from xllm_compile.models.checkpoint import SINGLE_FILE
from xllm_compile.models.config import DecoderConfig, read_hf_config
from xllm_compile.models.decoder import checkpoint_shapes
from xllm_compile.models.registry import read_model_config

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Large enough that layers matter and logits are spread, as in a trained model.
_WEIGHT_STD = 0.04
_NORM_STD = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One decoder as its config.json describes it; the file written has no other differences from the original's."""

    name: str
    vocab_size: int
    num_words: int
    """Ids with text of their own; the special tokens follow, and the rest only pads the vocabulary."""
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float

    @property
    def record_name(self) -> str:
        """The name as part of a record's."""
        return "".join(char if char.isalnum() else "_" for char in self.name)

    def with_layers(self, num_layers: int) -> "Shape":
        return replace(self, name=f"{self.name}-{num_layers}l", num_layers=num_layers)

    def hf_config(self) -> dict[str, Any]:
        """config.json of a Qwen3 model in bfloat16 with a tied head."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "dtype": "bfloat16",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "use_sliding_window": False,
            "eos_token_id": self.num_words + SPECIAL_TOKENS.index("<|im_end|>"),
            "pad_token_id": self.num_words,
        }


QWEN3_0_6B = Shape(
    name="qwen3-0.6b",
    vocab_size=151936,
    num_words=151643,
    hidden_size=1024,
    intermediate_size=3072,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    max_position_embeddings=40960,
    rope_theta=1e6,
)
QWEN3_1_7B_SLICE = replace(QWEN3_0_6B, name="qwen3-1.7b-4l", hidden_size=2048, intermediate_size=6144, num_layers=4)
# For dry runs and tests: every part of the real one, in seconds.
TINY = Shape(
    name="tiny",
    vocab_size=1024,
    num_words=1000,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_position_embeddings=8192,
    rope_theta=1e6,
)
SHAPES = {shape.name: shape for shape in (QWEN3_0_6B, QWEN3_1_7B_SLICE, TINY)}


def checkpoint(shape: Shape, work_dir: Path, *, seed: int = 1234) -> Path:
    """The model directory of this shape below ``work_dir``, made now unless it is there."""
    target = work_dir / "models" / f"{shape.name}-seed{seed}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_directory(target) as folder:
            _write_config(shape, folder)
            write_tokenizer(shape, folder)
            save_file(_random_weights(read_model_config(read_hf_config(folder)), seed), folder / SINGLE_FILE)
    return target


def _write_config(shape: Shape, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(shape.hf_config(), indent=2))
    generation = {"do_sample": False, "eos_token_id": shape.hf_config()["eos_token_id"]}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))


def _random_weights(config: DecoderConfig, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in checkpoint_shapes(config).items():
        mean, std = (1.0, _NORM_STD) if "norm" in name else (0.0, _WEIGHT_STD)
        weights[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(mean, std, generator=generator)
    return weights


def write_tokenizer(shape: Shape, folder: Path) -> None:
    """A byte-level BPE tokenizer of ``shape.num_words`` words: all bytes, then pairs and triples of printable ASCII.

    It costs what a trained one costs to load and to run, and nearly every id has text, so streams show every token.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(alphabet)}
    merges = []
    for left, right in _merges(shape.num_words - len(vocab)):
        merges.append((left, right))
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def _merges(count: int) -> Iterator[tuple[str, str]]:
    """``count`` merges: pairs of the symbols of printable ASCII, then a pair and one more."""
    # The byte-level alphabet writes a space as U+0120.
    symbols = [*string.ascii_letters, *string.digits, *string.punctuation, "\u0120"]
    pairs = [(a, b) for a in symbols for b in symbols]
    triples = ((a + b, c) for a, b in pairs for c in symbols)
    for index, merge in enumerate((*pairs, *triples) if count > len(pairs) else pairs):
        if index == count:
            return
        yield merge
