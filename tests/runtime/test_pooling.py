"""Embeddings in the engine: every row that counts, once, whatever the chunks; and how such requests end."""

from itertools import accumulate

import numpy as np
import pytest
import torch

from tests.runtime.fakes import EngineFactory
from tests.runtime.test_engine import EAGER, GREEDY, run
from xllm_compile.runtime.engine import Engine
from xllm_compile.runtime.outputs import RequestOutput
from xllm_compile.runtime.pooling import PoolingParams, make_embedding, pool_chunk
from xllm_compile.runtime.sampling_params import SamplingParams, embedding_params


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pooling": "max"}, "pooling='max' must be one of last, mean"),
        ({"dimensions": 0}, "dimensions=0 must be at least 1"),
    ],
)
def test_bad_params(options, said):
    with pytest.raises(ValueError, match=said):
        PoolingParams(**options)


def test_chunks_make_an_embedding():
    hidden = torch.tensor([[3.0, 4.0, 1.0], [1.0, 0.0, 5.0], [2.0, 2.0, 0.0]])
    last = PoolingParams(normalize=False)
    assert make_embedding(pool_chunk(hidden, last), 3, last).tolist() == [2.0, 2.0, 0.0]
    mean = PoolingParams(pooling="mean", normalize=False)
    whole = make_embedding(pool_chunk(hidden, mean), 3, mean)
    assert whole.tolist() == [2.0, 2.0, 2.0]
    # Cut first, normalised then: a shorter embedding has length 1 too.
    short = PoolingParams(dimensions=2)
    np.testing.assert_allclose(make_embedding(hidden[0], 3, short), [0.6, 0.8], rtol=1e-6)
    assert make_embedding(torch.zeros(3), 3, PoolingParams()).tolist() == [0.0, 0.0, 0.0]


def embed(engine: Engine, prompt: list[int], **options: str) -> RequestOutput:
    engine.add_request("one", prompt, embedding_params(PoolingParams(normalize=False, **options)))  # type: ignore[arg-type]
    return run(engine)["one"]


def expected(prompt: list[int], pooling: str) -> list[float]:
    """As HistoryRunner.pooled."""
    sums = list(accumulate(prompt))
    if pooling == "last":
        return [prompt[-1], len(prompt) - 1, sums[-1], 1]
    return np.mean([[token, at, sums[at], 1] for at, token in enumerate(prompt)], axis=0).tolist()


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("chunk", [2, 3, 32])
def test_any_chunks(make_engine: EngineFactory, pooling: str, chunk: int) -> None:
    engine, runner = make_engine(max_num_batched_tokens=chunk, max_num_seqs=2)
    for prompt in ([40], list(range(40, 51))):
        output = embed(engine, prompt, pooling=pooling)
        assert output.embedding is not None
        np.testing.assert_allclose(output.embedding, expected(prompt, pooling), rtol=1e-6)
        (completion,) = output.outputs
        assert (completion.token_ids, completion.text, completion.finish_reason) == ([], "", "stop")
    assert all(len(step.logits_at) == 0 for step in runner.steps)
    assert engine.stats().num_prompt_tokens == 12 and engine.stats().num_generated_tokens == 0


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_prompt_that_was_computed_before(make_engine: EngineFactory, pooling: str) -> None:
    """Whatever may be left of it: the mean needs the hidden state of every token, which no KV cache has."""
    engine, _ = make_engine()
    prompt = list(range(40, 100))
    engine.add_request("before", prompt, SamplingParams(max_tokens=2, **GREEDY))
    run(engine)
    for _ in range(2):
        output = embed(engine, prompt, pooling=pooling)
        assert output.embedding is not None
        np.testing.assert_allclose(output.embedding, expected(prompt, pooling), rtol=1e-6)


def test_with_preemption_and_company_each_stays_itself(make_engine: EngineFactory) -> None:
    engine, runner = make_engine(config=EAGER, total_tokens=64, max_num_batched_tokens=8, max_num_seqs=4)
    prompts = [[50 + index, *range(60, 60 + 9 * index)] for index in range(4)]
    for index, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=20, **GREEDY)
        engine.add_request(f"generate-{index}", prompt, params)
        pooling = PoolingParams(pooling="mean", normalize=False)
        engine.add_request(f"embed-{index}", prompt, embedding_params(pooling))
    final = run(engine)
    assert engine.stats().num_preemptions > 0
    for index, prompt in enumerate(prompts):
        assert final[f"generate-{index}"].outputs[0].token_ids == runner.greedy(prompt, 20)
        embedding = final[f"embed-{index}"].embedding
        assert embedding is not None
        np.testing.assert_allclose(embedding, expected(prompt, "mean"), rtol=1e-6)


def test_a_prompt_may_fill_the_context(make_engine: EngineFactory) -> None:
    engine, _ = make_engine(max_model_len=16)
    prompt = list(range(40, 56))
    assert embed(engine, prompt).embedding is not None
    with pytest.raises(ValueError, match="17 tokens and max_model_len=16 must hold it; shorten"):
        embed(engine, [*prompt, 1])
    with pytest.raises(ValueError, match="16 tokens and max_model_len=16 must hold it and one generated token"):
        engine.add_request("two", prompt, SamplingParams())


def test_more_dimensions_than_the_model_has(make_engine: EngineFactory) -> None:
    engine, _ = make_engine()
    with pytest.raises(ValueError, match="dimensions=5 is above the 4"):
        engine.add_request("one", [40], embedding_params(PoolingParams(dimensions=5)))
    with pytest.raises(ValueError, match="n=2 must be 1 for an embedding"):
        SamplingParams(n=2, pooling=PoolingParams())


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_abort(make_engine: EngineFactory, num_steps: int) -> None:
    engine, _ = make_engine(max_num_batched_tokens=4, max_num_seqs=2)
    engine.add_request("one", list(range(40, 56)), embedding_params(PoolingParams(pooling="mean")))
    for _ in range(num_steps):
        engine.step()
    engine.abort("one")
    output = run(engine)["one"]
    assert output.embedding is None and output.outputs[0].finish_reason == "abort"
