"""Benchmark checkpoints: complete, of the shape they claim, with a tokenizer whose ids have text."""

import json

from xllm_compile.benchmarks.checkpoints import QWEN3_0_6B, TINY, checkpoint
from xllm_compile.models.checkpoint import Checkpoint
from xllm_compile.models.config import read_hf_config
from xllm_compile.models.decoder import checkpoint_shapes
from xllm_compile.models.registry import read_model_config
from xllm_compile.runtime.tokenizer import Tokenizer


def test_a_checkpoint_is_what_the_driver_expects(tmp_path):
    folder = checkpoint(TINY, tmp_path)
    config = read_model_config(read_hf_config(folder))
    Checkpoint(folder).check(checkpoint_shapes(config))
    assert (config.num_layers, config.vocab_size) == (TINY.num_layers, TINY.vocab_size)


def test_a_second_call_finds_the_first_ones(tmp_path):
    before = (checkpoint(TINY, tmp_path) / "model.safetensors").stat().st_mtime_ns
    assert (checkpoint(TINY, tmp_path) / "model.safetensors").stat().st_mtime_ns == before


def test_one_seed_is_one_checkpoint(tmp_path):
    first, again, other = (
        Checkpoint(checkpoint(TINY, tmp_path / name, seed=seed)).content_hash()
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again != other


def test_every_word_of_the_tokenizer_has_text(tmp_path):
    tokenizer = Tokenizer.from_directory(checkpoint(TINY, tmp_path))
    assert tokenizer.is_byte_level
    assert all(tokenizer.token_bytes(token_id) for token_id in range(TINY.num_words))
    text = "def forward(self, x):\n    return x"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token_ids == {TINY.hf_config()["eos_token_id"]}


def test_the_real_shape_is_the_published_one():
    config = QWEN3_0_6B.hf_config()
    assert json.loads(json.dumps(config)) == config
    parameters = checkpoint_shapes(read_model_config(config))
    num_linear = sum(shape[0] * shape[1] for name, shape in parameters.items() if len(shape) == 2)
    assert num_linear == 440_401_920 + 151936 * 1024
