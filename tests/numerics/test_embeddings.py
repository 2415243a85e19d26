"""Embeddings against transformers' last_hidden_state in float32, compiled and operator by operator."""

import numpy as np
import pytest
import torch

from tests.helpers import FAMILIES, eager_model
from xllm_compile.benchmarks.parity import load_reference, random_prompts
from xllm_compile.runtime.instance import open_instance
from xllm_compile.runtime.instance_config import InstanceConfig
from xllm_compile.runtime.llm import LLMBase
from xllm_compile.runtime.outputs import RequestOutput
from xllm_compile.runtime.pooling import PoolingParams
from xllm_compile.runtime.sampling_params import SamplingParams, embedding_params

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("kernels")]

# Around the bucket of 4, and longer than a step.
LENGTHS = (1, 3, 4, 5, 64, 300)
PARAMS = (
    PoolingParams(),
    PoolingParams(pooling="mean"),
    PoolingParams(pooling="mean", normalize=False, dimensions=40),
)


def expected_embeddings(model_dir, prompts, params):
    model = load_reference(model_dir)
    with torch.inference_mode():
        states = [model.model(torch.tensor([prompt])).last_hidden_state[0] for prompt in prompts]
    found = []
    for hidden in states:
        values = (hidden[-1] if params.pooling == "last" else hidden.mean(0))[: params.dimensions]
        found.append((values / values.norm() if params.normalize else values).numpy())
    return found


def assert_equal_embeddings(model_dir, engine):
    prompts = random_prompts(LENGTHS, 4099)
    llm = LLMBase(engine)
    for params in PARAMS:
        wanted = expected_embeddings(model_dir, prompts, params)
        # All in one batch, chunked; and one alone.
        for chosen in (prompts, prompts[3:4]):
            outputs = llm.embed(chosen, params)
            for output in outputs:
                reference = wanted[prompts.index(output.prompt_token_ids)]
                assert output.embedding is not None and output.embedding.dtype == np.float32
                np.testing.assert_allclose(output.embedding, reference, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_operator_by_operator(family, tiny_model_dir, tmp_path):
    model_dir = tiny_model_dir(family)
    assert_equal_embeddings(model_dir, eager_model(model_dir, tmp_path).engine(max_num_batched_tokens=256))


def test_compiled(family_artifact, tiny_model_dir):
    instance = open_instance(family_artifact("qwen3"), InstanceConfig(max_num_seqs=8, warm_up=True))
    assert_equal_embeddings(tiny_model_dir("qwen3"), instance.engine)
    choices = instance.engine.stats().graph_cache.choices
    assert {outcome for part, outcome, _ in choices if part == "pool"} == {"dynamic"}


def test_beside_generation_both_are_as_alone(family_artifact):
    """Rows of a step depend on nothing but themselves, so the last token's embedding is bitwise the same."""
    engine = open_instance(family_artifact("qwen3"), InstanceConfig(max_num_seqs=8)).engine
    llm = LLMBase(engine)
    prompts = random_prompts((40, 5, 300), 4099)
    greedy = SamplingParams(temperature=0, ignore_eos=True, max_tokens=8)
    alone = [llm.embed(prompt)[0].embedding for prompt in prompts]
    tokens = [llm.generate(prompt, greedy)[0].outputs[0].token_ids for prompt in prompts]
    for index, prompt in enumerate(prompts):
        engine.add_request(f"embed-{index}", prompt, embedding_params())
        engine.add_request(f"generate-{index}", prompt, greedy)
    finished: dict[str, RequestOutput] = {}
    while engine.has_work:
        finished |= {output.request_id: output for output in engine.step()}
    for index in range(len(prompts)):
        np.testing.assert_array_equal(finished[f"embed-{index}"].embedding, alone[index])
        assert finished[f"generate-{index}"].outputs[0].token_ids == tokens[index]
    assert engine.stats().kv_tokens_used == 0
