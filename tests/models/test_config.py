"""From config.json to DecoderConfig: what is read, and what is refused with which words."""

import json

import pytest

from xllm_compile.models.config import DecoderConfig, UnsupportedModelError, read_hf_config
from xllm_compile.models.registry import FAMILIES, read_model_config

PLAIN = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
}
QWEN2 = PLAIN | {"architectures": ["Qwen2ForCausalLM"]}
QWEN3 = PLAIN | {"architectures": ["Qwen3ForCausalLM"]}


def test_llama():
    config = read_model_config(PLAIN)
    assert (config.head_dim, config.num_kv_heads, config.rope.rope_theta) == (16, 2, 10000.0)
    assert config.layer_windows == (0, 0, 0)
    assert not (config.has_qkv_bias or config.has_o_bias or config.has_mlp_bias or config.tie_word_embeddings)
    biased = read_model_config(PLAIN | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True})
    assert biased.has_qkv_bias and biased.has_o_bias and biased.has_mlp_bias and biased.tie_word_embeddings
    # The key is there for other tools; transformers' Llama has no window.
    assert read_model_config(PLAIN | {"use_sliding_window": True, "sliding_window": 8}).layer_windows == (0, 0, 0)


def test_qwen2_windows():
    config = read_model_config(QWEN2 | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1})
    assert config.layer_windows == (0, 8, 8)
    assert config.has_qkv_bias and not config.has_o_bias
    # As the released checkpoints have it: a window that is not used.
    assert read_model_config(QWEN2 | {"use_sliding_window": False, "sliding_window": 8}).layer_windows == (0, 0, 0)
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    named = read_model_config(QWEN2 | {"use_sliding_window": True, "sliding_window": 8, "layer_types": types})
    assert named.layer_windows == (8, 0, 8)


def test_qwen3_has_a_head_size_of_its_own():
    assert read_model_config(QWEN3).head_dim == 128
    config = read_model_config(QWEN3 | {"head_dim": 24})
    assert config.head_dim == 24 and config.has_qk_norm and not config.has_qkv_bias


def test_rope_of_old_and_new_checkpoints():
    new = {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}}
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert read_model_config(PLAIN | new) == read_model_config(PLAIN | old)
    yarn = read_model_config(PLAIN | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}})
    assert yarn.rope.original_max_position_embeddings == 512


def test_json_round_trip():
    config = read_model_config(QWEN2 | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1})
    assert DecoderConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["MambaForCausalLM"]}, ["'MambaForCausalLM'", *FAMILIES]),
        ({"architectures": None}, ["None", *FAMILIES]),
        ({"rope_scaling": {"rope_type": "longrope"}}, ["'longrope'", "default", "llama3"]),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, ["'mrope'"]),
        ({"rope_scaling": LLAMA3}, ["'llama3'", "high_freq_factor", "original_max_position_embeddings"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["'linear' needs factor"]),
        ({"rope_parameters": {"rope_type": "default", "twist": 1}}, ["['twist']"]),
        ({"hidden_act": "gelu"}, ["'gelu'", "silu"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads=4", "num_key_value_heads=3"]),
    ],
)
def test_what_is_not_supported_says_what_is(changes, said):
    with pytest.raises(UnsupportedModelError) as error:
        read_model_config(PLAIN | changes)
    assert [part for part in said if part not in str(error.value)] == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layer_types": ["full_attention"] * 2}, "layer_types names 2 layers, num_hidden_layers is 3"),
        ({"layer_types": ["sliding_attention"] * 3}, "use_sliding_window=None; config.json contradicts itself"),
        ({"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
    ],
)
def test_contradictions_between_layers(changes, said):
    with pytest.raises(UnsupportedModelError, match=said):
        read_model_config(QWEN3 | changes)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "rms_norm_eps"])
@pytest.mark.parametrize("value", [None, "12", True])
def test_fields_of_another_type(key, value):
    with pytest.raises(ValueError, match=f"config.json: {key} is {value!r}"):
        read_model_config(PLAIN | {key: value})


def test_config_file(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is no directory; give a Hugging Face model directory"):
        read_hf_config(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no config.json"):
        read_hf_config(tmp_path)
    path = tmp_path / "config.json"
    for text, said in (("{", "not valid JSON"), ("[1]", "holds list"), ("\xff", "not valid JSON")):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=said):
            read_hf_config(tmp_path)
    path.write_text(json.dumps(PLAIN))
    assert read_hf_config(tmp_path) == PLAIN
