"""Whole models of quantised checkpoints, against the same models with the dequantised weights in float32."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import compile_model, eager_model, greedy
from tests.numerics.test_parity import all_logits, rms
from tests.stored_checkpoints import CONFIGS, write_quantised
from xllm_compile import LLM
from xllm_compile.benchmarks.parity import random_prompts
from xllm_compile.build_config import BuildConfig
from xllm_compile.graph_passes.quantisation import Quantisation
from xllm_compile.models.checkpoint import CheckpointError
from xllm_compile.models.rope import rope_constants
from xllm_compile.progress import NoProgress
from xllm_compile.region_programs import make_programs
from xllm_compile.runtime.artifact import read_manifest
from xllm_compile.runtime.ops import quantised
from xllm_compile.runtime.weights import map_weights
from xllm_compile.source_reader import read_source
from xllm_compile.weight_builder import artifact_weights, build_weights

pytestmark = pytest.mark.numerics

# Reduction axes of whole groups of 32, also on each of two ranks.
SHAPE = {"hidden_size": 96, "intermediate_size": 192, "head_dim": 32}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_model_of_the_dequantised_weights(name, tiny_model_dir, tmp_path, kernels):
    stored_dir, plain_dir = write_quantised(tiny_model_dir("qwen3", **SHAPE), tmp_path, CONFIGS[name])
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    ours, reference = eager_model(stored_dir, tmp_path / "a"), eager_model(plain_dir, tmp_path / "b")
    (prompt,) = random_prompts((33,), ours.manifest.model.vocab_size)
    expected, found = all_logits(reference, prompt), all_logits(ours, prompt)
    # Sums in another order; the dynamic scheme rounds activations to 1/127 of a token's largest.
    assert rms(found - expected) <= (0.05 if "dynamic" in name else 1e-5) * rms(expected)
    before, after = (
        sum(weight.nbytes for name, weight in model.weights.items() if ".layers." in name)
        for model in (reference, ours)
    )
    assert after < (0.31 if "int8" in name else 0.2) * before


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_families_with_biases(family, tiny_model_dir, tmp_path, kernels):
    stored_dir, plain_dir = write_quantised(tiny_model_dir(family, **SHAPE), tmp_path, CONFIGS["awq"])
    (tmp_path / "a").mkdir()
    ours, reference = eager_model(stored_dir, tmp_path / "a"), eager_model(plain_dir, tmp_path)
    (prompt,) = random_prompts((9,), ours.manifest.model.vocab_size)
    expected, found = all_logits(reference, prompt), all_logits(ours, prompt)
    assert rms(found - expected) <= 1e-5 * rms(expected)


@pytest.mark.parametrize(
    "name",
    ["gptq", "gptq int8", "compressed int4, rows with zeros", "compressed int8, rows with zeros", "compressed int8"],
)
def test_ranks_hold_their_part(name, tiny_model_dir, tmp_path):
    """Of rows with their scales, and of columns with the groups that lie there, or with the scale of all."""
    stored_dir, plain_dir = write_quantised(tiny_model_dir("qwen3", **SHAPE), tmp_path, CONFIGS[name])
    config = BuildConfig(model_dir=stored_dir, output=tmp_path / "unused.xllm", dtype="float32", tensor_parallel_size=2)
    source = read_source(config)
    specs = artifact_weights(make_programs(source, config, NoProgress())[0])
    plain = load_file(plain_dir / "model.safetensors")
    layer = "model.layers.0."
    for rank in range(2):
        path, computed = tmp_path / f"{rank}.safetensors", rope_constants(source.config)
        build_weights(path, source.checkpoint, computed, specs, lambda done: None, rank, source.stored)
        weights = map_weights(path)
        rows, columns = plain[layer + "mlp.up_proj.weight"], plain[layer + "mlp.down_proj.weight"]
        up = dense(weights, layer + "mlp.gate_proj+up_proj.weight", rows.shape[0], rows.shape[1])[rows.shape[0] // 2 :]
        assert torch.equal(up, rows.chunk(2)[rank])
        down = dense(weights, layer + "mlp.down_proj.weight", columns.shape[0], columns.shape[1] // 2)
        assert torch.equal(down, columns.chunk(2, dim=1)[rank])


def dense(weights, name, rows, columns):
    is_int8 = weights[name].dtype == torch.int8
    if is_int8 and f"{name}.zero" not in weights:
        return quantised.unpack_int8(weights[name], rows, columns) * weights[f"{name}.scale"].unsqueeze(1)
    scale, zero = (quantised.unpack_scale(weights[f"{name}.{part}"], rows).float() for part in ("scale", "zero"))
    group_size = columns // scale.shape[1]
    codes = (
        quantised.unpack_int8(weights[name], rows, columns) if is_int8 else quantised.unpack_int4(weights[name], rows)
    )
    values = codes.float() - zero.repeat_interleave(group_size, 1)
    return values * scale.repeat_interleave(group_size, 1)


@pytest.mark.parametrize(("name", "label"), [("awq", "int4-g32 (awq)"), ("gptq int8", "int8-g32 (gptq)")])
def test_compiled_without_an_option(name, label, tiny_model_dir, tmp_path, kernels):
    stored_dir, _ = write_quantised(tiny_model_dir("qwen3", **SHAPE), tmp_path, CONFIGS[name])
    artifact = tmp_path / "out.xllm"
    options = ("--dtype", "float32", "--buckets", "4", "--max-num-batched-tokens", "64")
    done = compile_model(stored_dir, "-o", artifact, *options)
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(artifact)
    assert manifest.quantisation == label
    prompts = random_prompts((1, 7, 20), manifest.model.vocab_size)
    expected = greedy(eager_model(stored_dir, tmp_path).engine(), prompts, 8)
    assert greedy(LLM(artifact, max_num_seqs=4).engine, prompts, 8) == expected


@pytest.mark.parametrize(
    ("family", "name", "label"),
    [
        ("qwen3", "gptq", "int4-g32+head (gptq)"),
        ("llama", "compressed int8, dynamic", "int8-dynamic+head (compressed-tensors)"),
    ],
)
def test_a_head_may_be_rounded_beside_layers_that_are(family, name, label, tiny_model_dir, tmp_path, kernels):
    """The one that an embedding shares, and the one that it does not."""
    stored_dir, plain_dir = write_quantised(tiny_model_dir(family, **SHAPE), tmp_path, CONFIGS[name])
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    head = Quantisation(scheme="none", has_head=True)
    ours, reference = eager_model(stored_dir, tmp_path / "a", quantisation=head), eager_model(plain_dir, tmp_path / "b")
    assert ours.source.quantisation is not None and ours.source.quantisation.label == label
    (prompt,) = random_prompts((33,), ours.manifest.model.vocab_size)
    expected, found = all_logits(reference, prompt), all_logits(ours, prompt)
    assert 1e-4 * rms(expected) < rms(found - expected) <= 0.05 * rms(expected)
    weight = "lm_head.weight" if family == "llama" else "model.embed_tokens.weight"
    assert ours.weights[weight].dtype == torch.int8


def test_the_checkpoint_says_all_of_it(tiny_model_dir, tmp_path):
    """No option: the dtype is that of what is not quantised."""
    stored_dir, _ = write_quantised(tiny_model_dir("qwen3", **SHAPE), tmp_path, CONFIGS["compressed int8, dynamic"])
    source = read_source(BuildConfig(model_dir=stored_dir, output=tmp_path / "unused.xllm"))
    assert source.dtype == "float32" and source.stored is not None and source.quantisation is not None
    assert source.quantisation.label == "int8-dynamic (compressed-tensors)"


def test_what_is_quantised_is_not_quantised_again(tiny_model_dir, tmp_path):
    stored_dir, _ = write_quantised(tiny_model_dir("qwen3", **SHAPE), tmp_path, CONFIGS["gptq"])
    for options, said in (
        (("--quantize", "int8"), "is quantised already (quant_method 'gptq'); leave --quantize out"),
        (("--disable-pass", "quantise"), "'quantise' cannot be left out"),
        (("--tensor-parallel-size", "4"), "has 48 inputs on a rank, no multiple of 32"),
    ):
        done = compile_model(stored_dir, "-o", tmp_path / "out.xllm", *options)
        assert done.returncode == 2 and said in done.stderr, done.stderr


def test_scales_that_are_no_numbers_are_refused(tiny_model_dir, tmp_path):
    stored_dir, _ = write_quantised(tiny_model_dir("qwen3", **SHAPE), tmp_path, CONFIGS["gptq"])
    tensors = load_file(stored_dir / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.scales"][0, 5] = torch.inf
    save_file(tensors, stored_dir / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"a scale of model\.layers\.1\.mlp\.down_proj\.weight is NaN or infinite"):
        eager_model(stored_dir, tmp_path)


def test_what_a_quantised_checkpoint_lacks_is_told_with_its_quantisation(tiny_model_dir, tmp_path):
    stored_dir, _ = write_quantised(tiny_model_dir("llama", **SHAPE), tmp_path, CONFIGS["compressed int8"])
    tensors = load_file(stored_dir / "model.safetensors")
    tensors["lm_head.weight_packed"] = tensors.pop("lm_head.weight").to(torch.int32)
    save_file(tensors, stored_dir / "model.safetensors", {"format": "pt"})
    config = BuildConfig(model_dir=stored_dir, output=tmp_path / "unused.xllm")
    with pytest.raises(CheckpointError, match=r"lacks tensor lm_head\.weight .*only products of layers may be"):
        read_source(config)


def test_a_checkpoint_whose_quantisation_only_an_old_file_tells(tiny_model_dir, tmp_path):
    stored_dir, _ = write_quantised(tiny_model_dir("qwen3", **SHAPE), tmp_path, CONFIGS["gptq"])
    hf = json.loads((stored_dir / "config.json").read_text())
    (stored_dir / "quantize_config.json").write_text(json.dumps(hf.pop("quantization_config")))
    (stored_dir / "config.json").write_text(json.dumps(hf))
    config = BuildConfig(model_dir=stored_dir, output=tmp_path / "unused.xllm")
    with pytest.raises(
        CheckpointError, match=r'quantize_config\.json says that it is quantised.*"quant_method": "gptq"'
    ):
        read_source(config)
