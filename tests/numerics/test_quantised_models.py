"""Whole models quantised while compiling, against the same model with its weights rounded beforehand."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import DEMO_MODEL, compile_model, eager_model, greedy
from tests.numerics.test_parity import all_logits, rms
from xllm_compile import LLM
from xllm_compile.benchmarks.parity import random_prompts
from xllm_compile.graph_passes.quantisation import SCHEMES, Quantisation
from xllm_compile.runtime.artifact import read_manifest
from xllm_compile.runtime.ops.quantised import quantise_int4, quantise_int8

pytestmark = pytest.mark.numerics

# Every reduction axis is a multiple of 32.
SHAPE = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32}
# Of the logits, relative: float32 sums in another order; in 3 layers, activations to 1/127 of a token's largest.
MAX_ERROR = {"int8": 1e-5, "int4": 1e-5, "int8-dynamic": 0.05, "int4-dynamic": 0.05}


def rounded_copy(model_dir, target, scheme, has_head=False):
    """The checkpoint with the layers' matrices as the scheme rounds them, and with them what the head multiplies by."""
    shutil.copytree(model_dir, target)
    tensors = load_file(target / "model.safetensors")
    for name, weight in tensors.items():
        if weight.dim() == 2 and (has_head or ".layers." in name):
            if scheme.startswith("int4") and ".layers." in name:
                values, scale = quantise_int4(weight, 32)
                tensors[name] = values * scale.float().repeat_interleave(32, 1)
            else:
                values, scale = quantise_int8(weight)
                tensors[name] = values * scale.unsqueeze(1)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_equals_the_model_of_the_rounded_weights(scheme, family, tiny_model_dir, tmp_path, kernels):
    model_dir = tiny_model_dir(family, **SHAPE)
    plain = eager_model(model_dir, tmp_path)
    (tmp_path / "quantised").mkdir()
    ours = eager_model(model_dir, tmp_path / "quantised", quantisation=Quantisation(scheme=scheme))
    reference = eager_model(rounded_copy(model_dir, tmp_path / "rounded", scheme), tmp_path)
    (prompt,) = random_prompts((33,), ours.manifest.model.vocab_size)
    exact, expected, found = (all_logits(model, prompt) for model in (plain, reference, ours))
    assert rms(found - expected) <= MAX_ERROR[scheme] * rms(expected)
    # Rounding does show, so that the bound is no comparison of two unquantised models.
    assert rms(found - exact) > 10 * MAX_ERROR["int8"] * rms(exact)
    before, after = (
        sum(weight.nbytes for name, weight in model.weights.items() if ".layers." in name) for model in (plain, ours)
    )
    assert after < (0.2 if scheme.startswith("int4") else 0.3) * before


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_tied_head_is_rounded_with_its_embedding(scheme, tiny_model_dir, tmp_path, kernels):
    model_dir = tiny_model_dir("qwen3", **SHAPE, tie_word_embeddings=True)
    quantisation = Quantisation(scheme=scheme, has_head=True)
    ours = eager_model(model_dir, tmp_path, quantisation=quantisation)
    (tmp_path / "plain").mkdir()
    reference = eager_model(rounded_copy(model_dir, tmp_path / "rounded", scheme, has_head=True), tmp_path / "plain")
    (prompt,) = random_prompts((33,), ours.manifest.model.vocab_size)
    expected, found = (all_logits(model, prompt) for model in (reference, ours))
    assert rms(found - expected) <= MAX_ERROR[scheme] * rms(expected)
    assert not any(weight.dtype == torch.float32 and weight.dim() == 2 for weight in ours.weights.values())


def test_compiled(tiny_model_dir, tmp_path, kernels):
    """The graphs call the kernels with what the weights file holds; the manifest says what was done."""
    artifact, model_dir = tmp_path / "int4.xllm", tiny_model_dir("qwen3", **SHAPE)
    options = ("--dtype", "float32", "--buckets", "4", "--max-num-batched-tokens", "64", "--quantize", "int4")
    done = compile_model(model_dir, "-o", artifact, *options)
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(artifact)
    assert manifest.quantisation == "int4-g32"
    reports = {entry["region"]: entry for entry in manifest.passes if entry["name"] == "quantise"}
    assert reports["layer"]["matches"] == 4 and reports["head"]["skips"] == {"head keeps its weight": 1}
    stored = load_file(artifact / "weights/model.safetensors")
    assert manifest.memory_plan["weights_bytes"] == sum(tensor.nbytes for tensor in stored.values())
    prompts = random_prompts((1, 7, 20), manifest.model.vocab_size)
    expected = greedy(eager_model(model_dir, tmp_path, quantisation=Quantisation(scheme="int4")).engine(), prompts, 8)
    assert greedy(LLM(artifact, max_num_seqs=4).engine, prompts, 8) == expected


def test_a_checkpoint_with_nan_is_refused(tiny_model_dir, tmp_path):
    model_dir = shutil.copytree(tiny_model_dir("qwen3", **SHAPE), tmp_path / "model")
    tensors = load_file(model_dir / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = torch.nan
    save_file(tensors, model_dir / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.weight holds NaN.*without --quantize"):
        eager_model(model_dir, tmp_path, quantisation=Quantisation(scheme="int8"))


def test_products_that_stay_are_said(tmp_path):
    """288 inputs are no multiple of 128: half of the products are not what was asked for."""
    artifact = tmp_path / "demo.xllm"
    options = ("--buckets", "1", "--max-num-batched-tokens", "8", "--quantize", "int4", "--quantize-group", "128")
    done = compile_model(DEMO_MODEL, "-o", artifact, *options)
    assert done.returncode == 0
    assert "int4-g128: 2 of 4 products of region layer stay as they are: 288 inputs are no multiple" in done.stderr
