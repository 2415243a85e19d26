"""A checkpoint of a Qwen3 model as a GGUF file: MODEL_DIR FILE.gguf KIND. Runs in llama.cpp's environment.

Needs the package gguf beside llama-cpp-python. The converter of llama.cpp's own tree asks for torch and transformers,
and refuses tokenizers that it does not know by hash; the tensors and keys written here are those that it writes.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(model_dir: Path, output: Path) -> None:
    """In bfloat16, norms in float32."""
    config = json.loads((model_dir / "config.json").read_text())
    if config["model_type"] != "qwen3":
        raise ValueError(f"{model_dir} is a {config['model_type']} model; only qwen3 is written as GGUF here")
    writer = gguf.GGUFWriter(output, "qwen3")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    _add_tokenizer(writer, model_dir, config)
    for name, values in _tensors(model_dir / "model.safetensors"):
        if values.ndim == 1:
            writer.add_tensor(_gguf_name(name), (values.astype(np.uint32) << 16).view(np.float32))
        else:
            writer.add_tensor(_gguf_name(name), values.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, model_dir: Path, config: dict[str, int]) -> None:
    tokenizer = json.loads((model_dir / "tokenizer.json").read_text())
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    words = {index: word for word, index in tokenizer["model"]["vocab"].items()} | special
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    ids = range(config["vocab_size"])
    writer.add_token_list([words.get(index, f"[PAD{index}]") for index in ids])
    normal, control, unused = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.UNUSED
    writer.add_token_types([control if index in special else normal if index in words else unused for index in ids])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_eos_token_id(config["eos_token_id"])


def _gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight is blk.3.ffn_up.weight."""
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{_NAMES[stem]}.weight"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_NAMES[part]}.weight"


def _tensors(path: Path) -> Iterator[tuple[str, "np.ndarray"]]:
    """Names and bits (uint16) of a safetensors file in bfloat16."""
    data = np.memmap(path, dtype=np.uint8, mode="r")
    header_bytes = int(data[:8].view(np.uint64)[0])
    header = json.loads(bytes(data[8 : 8 + header_bytes]))
    header.pop("__metadata__", None)
    for name, tensor in header.items():
        if tensor["dtype"] != "BF16":
            raise ValueError(f"{path}: {name} is {tensor['dtype']}; only BF16 is written as GGUF here")
        begin, end = (8 + header_bytes + offset for offset in tensor["data_offsets"])
        yield name, data[begin:end].view(np.uint16).reshape(tensor["shape"])


def quantise(source: Path, output: Path, kind: str) -> None:
    """As llama-quantize does it."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(output).encode(), parameters)
    if code != 0:
        raise RuntimeError(f"llama_model_quantize to {kind} returned {code}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("kind", choices=["BF16", "Q8_0", "Q4_0", "Q4_K_M"])
    options = parser.parse_args()
    if options.kind == "BF16":
        write_gguf(options.model_dir, options.output)
        return
    whole = options.output.with_suffix(".bf16")
    write_gguf(options.model_dir, whole)
    quantise(whole, options.output, options.kind)
    whole.unlink()


if __name__ == "__main__":
    main()
