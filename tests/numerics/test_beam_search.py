"""Beam search against transformers in float32."""

import pytest
import torch

from xllm_compile.benchmarks.parity import load_reference, random_prompts
from xllm_compile.runtime.beam_search import BeamSearchParams
from xllm_compile.runtime.instance import open_instance
from xllm_compile.runtime.instance_config import InstanceConfig
from xllm_compile.runtime.llm import LLMBase

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("kernels")]

NUM_TOKENS = 6


@pytest.mark.parametrize("width", [2, 5])
def test_beams_are_those_of_transformers(family_artifact, tiny_model_dir, width):
    engine = open_instance(family_artifact("qwen3"), InstanceConfig(max_num_seqs=8)).engine
    prompts = random_prompts((1, 7, 64), 4099)
    params = BeamSearchParams(beam_width=width, n=2, max_tokens=NUM_TOKENS, ignore_eos=True)
    outputs = LLMBase(engine).beam_search(prompts, params)
    model = load_reference(tiny_model_dir("qwen3"))
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = torch.tensor([prompt])
        reference = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=width,
            num_return_sequences=2,
            max_new_tokens=NUM_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        expected = reference.sequences[:, len(prompt) :].tolist()
        assert [completion.token_ids for completion in output.outputs] == expected
        scores = [(completion.cumulative_logprob or 0.0) / NUM_TOKENS for completion in output.outputs]
        assert scores == pytest.approx(reference.sequences_scores.tolist(), abs=1e-4)
