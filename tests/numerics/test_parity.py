"""Greedy tokens of whole models against transformers in float32, operator by operator and compiled."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import FAMILIES, REPOSITORY, EagerModel, eager_model, greedy, model_directory
from xllm_compile import LLM
from xllm_compile.benchmarks.parity import (
    PROMPT_LENGTHS,
    QWEN3_0_6B,
    Chain,
    departures,
    load_reference,
    random_prompts,
    reference_chain,
)
from xllm_compile.runtime.step import Step

pytestmark = pytest.mark.numerics

NUM_TOKENS = 12
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
# What one config.json may change, each on top of a family's checkpoint.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "rope default, other theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}),
    "rope linear": ("qwen3", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}}),
    "rope dynamic, within the trained length": ("qwen3", {"rope_parameters": DYNAMIC}),
    "rope dynamic, up to and beyond it": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 96}),
    "rope yarn": ("qwen3", {"rope_parameters": YARN, "max_position_embeddings": 512}),
    "rope yarn, attention_factor": (
        "qwen2",
        {"rope_parameters": {**YARN, "attention_factor": 1.3}, "max_position_embeddings": 512},
    ),
    "rope yarn, mscale": (
        "llama",
        {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4}, "max_position_embeddings": 512},
    ),
    "rope yarn, no truncation": (
        "llama",
        {"rope_parameters": {**YARN, "truncate": False, "beta_fast": 16.0}, "max_position_embeddings": 512},
    ),
    "rope llama3": ("llama", {"rope_parameters": LLAMA3}),
    "one query head per key head": ("qwen3", {"num_key_value_heads": 4}),
    "four query heads per key head": ("llama", {"num_key_value_heads": 1}),
    "untied": ("qwen3", {"tie_word_embeddings": False}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "tied with bias": ("qwen2", {"tie_word_embeddings": True, "use_sliding_window": False}),
    "no bias": ("llama", {"attention_bias": False, "mlp_bias": False}),
    "qwen3 with bias": ("qwen3", {"attention_bias": True}),
    "head_dim is hidden / heads": ("qwen3", {"head_dim": 18}),
    "window on every layer": ("qwen2", {"max_window_layers": 0}),
}


def chains_of(model_dir: Path, lengths: tuple[int, ...] = PROMPT_LENGTHS) -> list[Chain]:
    model = load_reference(model_dir)
    prompts = random_prompts(lengths, model.config.vocab_size)
    chains = [reference_chain(model, prompt, NUM_TOKENS) for prompt in prompts]
    # A model that repeats itself would hide a wrong position or a stale cache.
    assert len({token for chain in chains for token in chain.tokens}) > NUM_TOKENS
    return chains


def assert_parity(chains: list[Chain], outputs: list[list[int]]) -> None:
    """Equal, but for a step at which the reference's own two best logits are closer than 1e-3."""
    found = departures(chains, outputs)
    assert [departure for departure in found if not departure.is_undecided] == []


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def family_chains(family, tiny_model_dir):
    return chains_of(tiny_model_dir(family))


@pytest.fixture(scope="module")
def family_model(family, tiny_model_dir, tmp_path_factory, kernels) -> EagerModel:
    return eager_model(tiny_model_dir(family), tmp_path_factory.mktemp(family))


@pytest.mark.parametrize("chunk", [64, 512])
def test_one_mixed_batch_in_chunks(family_model, family_chains, chunk):
    engine = family_model.engine(max_num_batched_tokens=chunk)
    assert_parity(family_chains, greedy(engine, [chain.prompt for chain in family_chains], NUM_TOKENS))
    # Prefill and decode shared steps: alone, the chunks and the tokens would have taken more.
    alone = sum(-(-len(chain.prompt) // chunk) + NUM_TOKENS - 1 for chain in family_chains)
    assert engine.stats().num_steps < alone


def test_one_by_one(family_model, family_chains):
    engine = family_model.engine(max_num_batched_tokens=97)
    outputs = [greedy(engine, [chain.prompt], NUM_TOKENS)[0] for chain in family_chains]
    assert_parity(family_chains, outputs)


def test_compiled(family, family_artifact, family_chains, kernels):
    llm = LLM(family_artifact(family), max_num_seqs=8)
    prompts = [chain.prompt for chain in family_chains]
    assert_parity(family_chains, greedy(llm.engine, prompts, NUM_TOKENS))
    assert_parity(family_chains, [greedy(llm.engine, [prompt], NUM_TOKENS)[0] for prompt in prompts])
    assert_parity(family_chains[:4], greedy(llm.engine, prompts[:4], NUM_TOKENS))
    counts = llm.engine.stats().graph_cache.by_outcome()
    assert counts["exact"] and counts["padded"] and counts["dynamic"] and not counts["eager"]


@pytest.mark.parametrize("name", list(VARIANTS))
def test_variants(name, tiny_model_dir, tmp_path, kernels):
    family, changes = VARIANTS[name]
    model_dir = tiny_model_dir(family, **changes)
    is_stretched = family == "llama" and changes.get("rope_parameters") is DYNAMIC
    model = eager_model(model_dir, tmp_path, max_model_len=384 if is_stretched else None)
    # 90 and 12 more cross the 96 positions of the stretched model.
    chains = chains_of(model_dir, (1, 7, 64, 90, 300))
    assert_parity(chains, greedy(model.engine(max_num_batched_tokens=50), [c.prompt for c in chains], NUM_TOKENS))


def test_a_real_shape_at_reduced_depth(tmp_path, kernels):
    config = {**QWEN3_0_6B, "num_hidden_layers": 2, "max_position_embeddings": 2304}
    # Not below pytest's own folder, which is kept: the checkpoint and its weights are 1 GB.
    with tempfile.TemporaryDirectory(dir=REPOSITORY / ".cache") as folder:
        model_dir = model_directory(Path(folder), config, dtype="bfloat16")
        chains = chains_of(model_dir)
        engine = eager_model(model_dir, Path(folder)).engine(max_num_batched_tokens=512)
        assert_parity(chains, greedy(engine, [chain.prompt for chain in chains], NUM_TOKENS))


@pytest.mark.parametrize("length", [1, 33, 300])
def test_bfloat16_is_as_near_to_float32_as_transformers(family, length, tiny_model_dir, tmp_path, kernels):
    """Both round to bfloat16 after each operator, at other places; neither should be farther from float32 by more
    than the spread of such rounding: 1.5 times."""
    model_dir = tiny_model_dir(family, dtype="bfloat16")
    (prompt,) = random_prompts((length,), FAMILIES[family]["vocab_size"])
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        exact = load_reference(model_dir)(ids).logits[0]
        theirs = load_reference(model_dir, torch.bfloat16)(ids).logits[0].float()
    ours = all_logits(eager_model(model_dir, tmp_path, dtype="bfloat16"), prompt)
    # A real difference, so that the bound is no comparison of two zeros.
    assert rms(theirs - exact) > 1e-4 * rms(exact)
    assert rms(ours - exact) <= 1.5 * rms(theirs - exact)


def all_logits(model: EagerModel, prompt: list[int]) -> torch.Tensor:
    """Logits at every position of the prompt, computed in one step."""
    count = np.arange(len(prompt), dtype=np.int32)
    step = Step(
        token_ids=np.array(prompt, dtype=np.int32),
        positions=count,
        rope_len=count + 1,
        seq_start=np.array([0, len(prompt)], dtype=np.int32),
        context_len=np.array([len(prompt)], dtype=np.int32),
        slot=np.zeros(1, dtype=np.int32),
        logits_at=count,
    )
    return model.runner().execute(step)


def rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())
