"""Preemption that copies KV out and back, on a runner that reads every token back from the pages."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.fakes import EngineFactory, train_byte_level
from tests.runtime.test_engine import EAGER, run
from xllm_compile.runtime import step_planner
from xllm_compile.runtime.engine import Engine
from xllm_compile.runtime.instance_config import InstanceConfig
from xllm_compile.runtime.memory.cpu_memory import CpuMemory
from xllm_compile.runtime.memory.swap_space import SwapSpace
from xllm_compile.runtime.pooling import PoolingParams
from xllm_compile.runtime.sampling_params import SamplingParams, embedding_params
from xllm_compile.runtime.tokenizer import Tokenizer

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
BYTES_PER_TOKEN = 4096
PROMPTS = [[100 + 10 * index + at % 7 for at in range(5 + 3 * index)] for index in range(6)]
Choose = Callable[[Callable[[int], bool]], None]


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Choose:
    """Has the copying of so many tokens pay or not; what it really costs is not the same on any two machines."""

    def set_pays(pays: Callable[[int], bool]) -> None:
        monkeypatch.setattr(step_planner, "swap_pays", lambda num_tokens, *_: pays(num_tokens))

    return set_pays


def add_all(engine: Engine, **params: Any) -> None:
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(str(index), prompt, SamplingParams(**{"max_tokens": 25, **GREEDY, **params}))


@pytest.mark.parametrize("block_tokens", [None, 4], ids=["alone", "with-prefix-cache"])
@pytest.mark.parametrize("way", ["swap", "recompute", "both"])
def test_tokens_are_the_same_whatever_becomes_of_preempted_kv(
    make_engine: EngineFactory, choose: Choose, way: str, block_tokens: int | None
) -> None:
    choose({"swap": lambda _: True, "recompute": lambda _: False, "both": lambda count: count % 2 == 0}[way])
    engine, runner = make_engine(
        config=EAGER,
        total_tokens=72,
        max_num_batched_tokens=9,
        block_tokens=block_tokens,
        swap_bytes=200 * BYTES_PER_TOKEN,
    )
    add_all(engine, prompt_logprobs=0)
    final = run(engine)
    stats = engine.stats()
    assert stats.num_preemptions > 1
    assert (stats.num_swaps > 0) == (way != "recompute") and (stats.num_swaps == stats.num_preemptions) == (
        way == "swap"
    )
    for index, prompt in enumerate(PROMPTS):
        assert final[str(index)].outputs[0].token_ids == runner.greedy(prompt, 25)
        assert len(final[str(index)].prompt_logprobs or ()) == len(prompt)
    assert stats.kv_swap_bytes == 0


def test_what_was_swapped_out_is_not_computed_again(make_sync_engine: EngineFactory, choose: Choose) -> None:
    choose(lambda _: True)
    engine, runner = make_sync_engine(config=EAGER, total_tokens=72, swap_bytes=200 * BYTES_PER_TOKEN)
    add_all(engine)
    run(engine)
    assert engine.stats().num_swaps == engine.stats().num_preemptions > 0
    # The last token of each is never written.
    assert sum(len(step.token_ids) for step in runner.steps) == sum(len(prompt) + 24 for prompt in PROMPTS)


def test_seeded_sampling_goes_on_where_it_stopped(make_engine: EngineFactory, choose: Choose) -> None:
    choose(lambda _: True)
    params: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "seed": 7, "frequency_penalty": 0.5}
    alone, _ = make_engine()
    add_all(alone, **params)
    crowded, _ = make_engine(config=EAGER, total_tokens=72, swap_bytes=200 * BYTES_PER_TOKEN)
    add_all(crowded, **params)
    expected, found = run(alone), run(crowded)
    assert crowded.stats().num_swaps > 0
    for index in expected:
        assert found[index].outputs[0].token_ids == expected[index].outputs[0].token_ids


def test_the_space_is_bounded_and_without_room_the_kv_is_computed_again(
    make_engine: EngineFactory, choose: Choose
) -> None:
    choose(lambda _: True)
    limit = 30 * BYTES_PER_TOKEN
    engine, runner = make_engine(config=EAGER, total_tokens=72, swap_bytes=limit)
    add_all(engine)
    final, most = {}, 0
    while engine.has_work:
        final.update({output.request_id: output for output in engine.step() if output.finished})
        most = max(most, engine.stats().kv_swap_bytes or 0)
    assert 0 < most <= limit
    assert 0 < engine.stats().num_swaps < engine.stats().num_preemptions
    assert all(final[str(index)].outputs[0].token_ids == runner.greedy(PROMPTS[index], 25) for index in range(6))


def test_abort_of_a_swapped_request_frees_its_space(make_engine: EngineFactory, choose: Choose) -> None:
    choose(lambda _: True)
    engine, runner = make_engine(config=EAGER, total_tokens=72, swap_bytes=200 * BYTES_PER_TOKEN)
    add_all(engine)
    while not engine.stats().kv_swap_bytes:
        engine.step()
    for request_id, request in list(engine._requests.items()):
        if any(sequence.swapped for sequence in request.sequences):
            engine.abort(request_id)
    assert engine.stats().kv_swap_bytes == 0
    final = run(engine)
    done = [output for output in final.values() if output.outputs[0].finish_reason == "length"]
    assert 0 < len(done) < len(PROMPTS)
    for output in done:
        assert output.outputs[0].token_ids == runner.greedy(PROMPTS[int(output.request_id)], 25)


def test_an_embedding_is_never_swapped(make_sync_engine: EngineFactory, choose: Choose) -> None:
    choose(lambda _: True)
    engine, _ = make_sync_engine(
        config=EAGER, max_model_len=40, total_tokens=40, max_num_batched_tokens=8, swap_bytes=1 << 30
    )
    prompt = [60 + at for at in range(30)]
    engine.add_request("late", [50] * 8, SamplingParams(max_tokens=28, priority=-1, **GREEDY))
    engine.add_request("embedded", prompt, embedding_params(PoolingParams(pooling="mean")))
    final = run(engine)
    assert engine.stats().num_preemptions > 0 and engine.stats().num_swaps == 0
    alone, _ = make_sync_engine()
    alone.add_request("embedded", prompt, embedding_params(PoolingParams(pooling="mean")))
    expected = run(alone)["embedded"].embedding
    assert np.array_equal(final["embedded"].embedding, expected)  # type: ignore[arg-type]


@settings(max_examples=25)
@given(data=st.data(), is_async=st.booleans())
def test_any_load_with_any_choices(
    data: st.DataObject, is_async: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "tokenizer"
    path.mkdir(exist_ok=True)
    train_byte_level().save(str(path / "tokenizer.json"))
    factory = EngineFactory(Tokenizer.from_directory(path), is_async=is_async)
    engine, runner = factory(
        config=EAGER,
        total_tokens=data.draw(st.integers(66, 100)),
        block_tokens=data.draw(st.sampled_from([None, 4])),
        max_num_batched_tokens=data.draw(st.integers(8, 32)),
        swap_bytes=data.draw(st.integers(1, 80)) * BYTES_PER_TOKEN,
    )
    choices = data.draw(st.lists(st.booleans(), min_size=1, max_size=8))
    turns = itertools.cycle(choices)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_planner, "swap_pays", lambda *_: next(turns))
        lengths = data.draw(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=8))
        prompts = {}
        for index, (length, count) in enumerate(lengths):
            prompts[str(index)] = ([40 + index % 3 + at for at in range(length)], count)
            engine.add_request(str(index), prompts[str(index)][0], SamplingParams(max_tokens=count, **GREEDY))
        final = run(engine)
    for name, (prompt, count) in prompts.items():
        assert final[name].outputs[0].token_ids == runner.greedy(prompt, count)
    assert engine.stats().kv_swap_bytes == 0
    engine.close()


def test_the_speed_of_copies_is_measured() -> None:
    space = SwapSpace(1 << 20, CpuMemory(1, 1 << 16))
    first = space.path(4096)
    # Between a disk's and a cache's.
    assert 1e6 < first.bytes_per_s < 1e13 and first.kv_bytes_per_token == 4096


def test_a_space_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="kv_swap_bytes=0 must be at least 1"):
        InstanceConfig(kv_swap_bytes=0)
    with pytest.raises(ValueError, match="max_bytes=0 of the swap space"):
        SwapSpace(0, CpuMemory(1, 4096))
