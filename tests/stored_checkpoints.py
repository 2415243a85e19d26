"""Tiny checkpoints in the formats that others quantise to, written from the formats' definitions alone."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SEQUENTIAL = tuple(range(8))
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def compressed_config(num_bits: int, layout: str = "pack-quantized", **weights: Any) -> dict[str, Any]:
    """As llm-compressor writes it; ``weights`` changes the weights' part."""
    plain = {"num_bits": num_bits, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**plain, "dynamic": False, "actorder": None, **weights},
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


DYNAMIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
_W8A8 = compressed_config(8, "int-quantized")
_W8A8["config_groups"]["group_0"]["input_activations"] = DYNAMIC
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "lm_head": False}
CONFIGS: dict[str, dict[str, Any]] = {
    "compressed int4, groups": compressed_config(4, strategy="group", group_size=32),
    "compressed int4, groups with zeros": compressed_config(4, strategy="group", group_size=32, symmetric=False),
    "compressed int4, rows": compressed_config(4),
    "compressed int4, rows with zeros": compressed_config(4, symmetric=False),
    "compressed int8, packed": compressed_config(8),
    "compressed int8, groups": compressed_config(8, strategy="group", group_size=32),
    "compressed int8, rows with zeros": compressed_config(8, symmetric=False),
    "compressed int8": compressed_config(8, "int-quantized"),
    "compressed int8, dynamic": _W8A8,
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    "gptq": {**_GPTQ, "checkpoint_format": "gptq"},
    "gptq, one group": {**_GPTQ, "group_size": -1, "desc_act": True},
    "gptq_v2": {**_GPTQ, "checkpoint_format": "gptq_v2", "sym": False},
    "gptq int8": {**_GPTQ, "bits": 8},
    "gptq int8, one group": {**_GPTQ, "bits": 8, "group_size": -1},
    "gptq_v2 int8": {**_GPTQ, "bits": 8, "checkpoint_format": "gptq_v2", "sym": False},
}


def pack_words(codes: Tensor, num_bits: int, order: Sequence[int] | None = None) -> Tensor:
    """[R, K] codes from 0 on -> [R, ceil(K * bits / 32)] int32: place i of a word is its element order[i]."""
    per_word = 32 // num_bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_word)).numpy().astype(np.uint32)
    words = np.zeros((padded.shape[0], padded.shape[1] // per_word), np.uint32)
    for place, element in enumerate(order or range(per_word)):
        words |= padded[:, element::per_word] << np.uint32(place * num_bits)
    return torch.from_numpy(words.view(np.int32).copy())


def stored_parts(config: dict[str, Any], weight: str, codes: Tensor, zero: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """The tensors of one weight: codes [N, C], zero and scale [N, G], codes and zero points counted from 0."""
    base = weight.removesuffix("weight")
    if config["quant_method"] == "awq":
        return {
            f"{base}qweight": pack_words(codes.T, 4, AWQ_ORDER),
            f"{base}qzeros": pack_words(zero.T, 4, AWQ_ORDER),
            f"{base}scales": scale.T.contiguous(),
        }
    if config["quant_method"] == "gptq":
        num_bits = config["bits"]
        stored_zero = zero if config.get("checkpoint_format") == "gptq_v2" else (zero - 1) % (1 << num_bits)
        group_size = codes.shape[1] // scale.shape[1]
        return {
            f"{base}qweight": pack_words(codes, num_bits).T.contiguous(),
            f"{base}qzeros": pack_words(stored_zero.T, num_bits),
            f"{base}scales": scale.T.contiguous(),
            f"{base}g_idx": torch.arange(codes.shape[1], dtype=torch.int32) // group_size,
        }
    weights = config["config_groups"]["group_0"]["weights"]
    if config["format"] == "int-quantized":
        return {weight: (codes - 128).to(torch.int8), f"{weight}_scale": scale}
    parts = {
        f"{weight}_packed": pack_words(codes, weights["num_bits"]),
        f"{weight}_scale": scale,
        f"{weight}_shape": torch.tensor(codes.shape),
    }
    if not weights["symmetric"]:
        parts[f"{weight}_zero_point"] = pack_words(zero.T, weights["num_bits"]).T.contiguous()
    return parts


def random_codes(config: dict[str, Any], shape: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, zero points and float16 scales of a weight, of about the size of a real one."""
    generator = torch.Generator().manual_seed(seed)
    weights = config.get("config_groups", {}).get("group_0", {}).get("weights", config)
    num_bits, rows, columns = weights.get("num_bits") or weights["bits"], *shape
    size = weights["group_size"]
    groups = 1 if size in (None, -1) else columns // size
    levels = 1 << num_bits
    codes = torch.randint(0, levels, shape, generator=generator)
    zero = torch.full((rows, groups), levels // 2)
    if config["quant_method"] in ("awq", "gptq") or not weights["symmetric"]:
        zero = torch.randint(0, levels, (rows, groups), generator=generator)
    scale = (torch.rand(rows, groups, generator=generator) + 0.5) / levels / columns**0.5 * 4
    return codes, zero, scale.half()


def write_quantised(model_dir: Path, target: Path, config: dict[str, Any]) -> tuple[Path, Path]:
    """The checkpoint with random quantised layers, and the same with their values in float32; below ``target``."""
    stored_dir, plain_dir = (Path(shutil.copytree(model_dir, target / name)) for name in ("stored", "plain"))
    plain = load_file(model_dir / "model.safetensors")
    stored = dict(plain)
    for seed, (name, tensor) in enumerate(sorted(plain.items())):
        if ".layers." in name and tensor.dim() == 2:
            codes, zero, scale = random_codes(config, (tensor.shape[0], tensor.shape[1]), seed)
            del stored[name]
            stored.update(stored_parts(config, name, codes, zero, scale))
            group_size = codes.shape[1] // scale.shape[1]
            zeros, scales = (part.float().repeat_interleave(group_size, 1) for part in (zero, scale))
            plain[name] = (codes.float() - zeros) * scales
    save_file(stored, stored_dir / "model.safetensors", {"format": "pt"})
    save_file(plain, plain_dir / "model.safetensors", {"format": "pt"})
    hf = json.loads((stored_dir / "config.json").read_text())
    (stored_dir / "config.json").write_text(json.dumps({**hf, "quantization_config": config}))
    return stored_dir, plain_dir
