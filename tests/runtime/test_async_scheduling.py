"""The two-stage pipeline: the same tokens as step by step, whatever ends, fails or leaves at whatever moment."""

import gc
import threading
from typing import Any

import pytest

from tests.runtime.fakes import EngineFactory, HistoryRunner
from xllm_compile.runtime.engine import Engine
from xllm_compile.runtime.outputs import CompletionOutput, RequestOutput
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.runtime.step_predictor import StepPrior
from xllm_compile.runtime.tokenizer import Tokenizer

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture
def make_async_engine(tokenizer: Tokenizer) -> EngineFactory:
    return EngineFactory(tokenizer, is_async=True)


def run(engine: Engine) -> dict[str, RequestOutput]:
    final: dict[str, RequestOutput] = {}
    while engine.has_work:
        final |= {output.request_id: output for output in engine.step()}
    return final


def mixed_requests(engine: Engine) -> None:
    """Every option that looks at what was generated before, in a cache too small for all of them."""
    options: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"temperature": 1.0, "seed": 3, "frequency_penalty": 1.0, "logprobs": 2},
        {"temperature": 0.7, "seed": 4, "top_p": 0.8, "min_tokens": 12, "stop_token_ids": list(range(100))},
        {"temperature": 1.0, "seed": 5, "n": 3, "stop": ["e", "th"]},
        {"temperature": 0, "prompt_logprobs": 1, "logit_bias": {7: 5.0}},
    ]
    for index, each in enumerate(options):
        params = SamplingParams(max_tokens=20, **each)
        engine.add_request(str(index), [50 + index] * (1 + 4 * index), params)


def seen(final: dict[str, RequestOutput]) -> dict[str, tuple[list[CompletionOutput], Any]]:
    return {name: (output.outputs, output.prompt_logprobs) for name, output in sorted(final.items())}


@pytest.mark.parametrize("total_tokens", [64, 90, 512])
def test_everything_that_depends_on_earlier_tokens_is_bit_identical(
    make_sync_engine: EngineFactory, make_async_engine: EngineFactory, total_tokens: int
) -> None:
    results = []
    for make in (make_sync_engine, make_async_engine):
        engine, _ = make(total_tokens=total_tokens, max_num_batched_tokens=11)
        mixed_requests(engine)
        results.append(seen(run(engine)))
        assert engine.stats().kv_tokens_used == 0
    assert results[0] == results[1]


def test_the_host_plans_while_the_device_runs(make_async_engine: EngineFactory) -> None:
    engine, runner = make_async_engine()
    engine.add_request("one", [50, 51], SamplingParams(max_tokens=5, **GREEDY))
    runner.gate.clear()
    # Returns although the device stands still: the step is launched and nothing is known of it.
    assert engine.step() == [] and engine.stats().num_steps == 0
    second = threading.Thread(target=engine.step)
    second.start()
    runner.gate.set()
    second.join()
    assert engine.stats().num_steps == 1
    assert run(engine)["one"].outputs[0].token_ids == runner.greedy([50, 51], 5)


def test_what_comes_while_a_step_runs_is_in_the_next_one(make_async_engine: EngineFactory) -> None:
    # A step is predicted to take a minute: it is not time to plan the next one until it has ended.
    prior = StepPrior(by_tokens=lambda _: 60.0, token_s=1e-3, sequence_s=1e-3, key_s=1e-6, pair_s=1e-9)
    engine, runner = make_async_engine(prior=prior)
    engine.add_request("one", [50, 51], SamplingParams(max_tokens=5, **GREEDY))
    assert engine.step() == []
    # Waits for the end, and leaves it to the caller to bring what came meanwhile.
    assert engine.step() == [] and engine.stats().num_steps == 0
    engine.add_request("two", [60, 61, 62], SamplingParams(max_tokens=5, **GREEDY))
    final = run(engine)
    assert [len(step.token_ids) for step in runner.steps[:3]] == [2, 4, 2]
    assert final["one"].outputs[0].token_ids == runner.greedy([50, 51], 5)
    assert final["two"].outputs[0].token_ids == runner.greedy([60, 61, 62], 5)


def test_a_known_end_costs_no_step(make_async_engine: EngineFactory) -> None:
    engine, runner = make_async_engine()
    engine.add_request("one", [50, 51], SamplingParams(max_tokens=5, **GREEDY))
    run(engine)
    assert len(runner.steps) == 5


def test_an_end_that_only_the_token_tells_costs_one_step_and_no_token(make_async_engine: EngineFactory) -> None:
    engine, runner = make_async_engine()
    runner.script([50, 51], [9, 2, 8])
    engine.add_request("one", [50, 51], SamplingParams(max_tokens=9, temperature=0))
    output = run(engine)["one"]
    assert output.outputs[0].token_ids == [9, 2] and output.outputs[0].finish_reason == "stop"
    assert len(runner.steps) == 3
    assert engine.stats().num_generated_tokens == 2 and engine.stats().kv_tokens_used == 0


def test_a_slot_is_not_reused_while_a_step_with_it_runs(make_async_engine: EngineFactory) -> None:
    engine, runner = make_async_engine(num_slots=1, max_num_seqs=1, total_tokens=64)
    runner.script([50], [9, 2])
    engine.add_request("a", [50], SamplingParams(max_tokens=9, temperature=0))
    engine.add_request("b", [60, 61], SamplingParams(max_tokens=4, **GREEDY))
    final = run(engine)
    assert final["a"].outputs[0].token_ids == [9, 2]
    assert final["b"].outputs[0].token_ids == runner.greedy([60, 61], 4)


def test_a_failed_step_takes_those_behind_it_along(make_async_engine: EngineFactory) -> None:
    engine, runner = make_async_engine()
    for index in range(3):
        engine.add_request(str(index), [50 + index], SamplingParams(max_tokens=9, **GREEDY))
    engine.step()
    engine.step()
    runner.fails = True
    with pytest.raises(RuntimeError, match="the device is gone"):
        while True:
            engine.step()
    runner.fails = False
    for index in range(3):
        engine.abort(str(index))
    assert {output.outputs[0].finish_reason for output in run(engine).values()} == {"abort"}
    assert engine.stats().kv_tokens_used == 0
    _still_works(engine, runner)


def _still_works(engine: Engine, runner: HistoryRunner) -> None:
    engine.add_request("after", [70], SamplingParams(max_tokens=4, **GREEDY))
    assert run(engine)["after"].outputs[0].token_ids == runner.greedy([70], 4)


def test_close_ends_the_device_thread(make_async_engine: EngineFactory) -> None:
    before = set(threading.enumerate())
    engine, runner = make_async_engine()
    _still_works(engine, runner)
    started = set(threading.enumerate()) - before
    names = {thread.name.partition("_")[0] for thread in started}
    assert names == {"xllm-device", "xllm-premap", "xllm-prepare"}
    engine.close()
    engine.close()
    assert not any(thread.is_alive() for thread in started)


def test_an_engine_that_is_dropped_ends_its_thread(make_async_engine: EngineFactory) -> None:
    before = set(threading.enumerate())
    engine, runner = make_async_engine()
    _still_works(engine, runner)
    started = set(threading.enumerate()) - before
    del engine, runner
    gc.collect()
    # The device's frees tensors, which must be over when the interpreter ends.
    assert not any(thread.is_alive() for thread in started if thread.name == "xllm-device")
    for thread in started:
        thread.join(timeout=60)
        assert not thread.is_alive()


def test_time_between_steps_counts_only_where_there_was_work(make_engine: EngineFactory) -> None:
    engine, runner = make_engine()
    engine.add_request("one", [50], SamplingParams(max_tokens=1, **GREEDY))
    run(engine)
    engine.add_request("two", [50], SamplingParams(max_tokens=1, **GREEDY))
    run(engine)
    # Two steps, and between them nobody wanted anything.
    assert engine.stats().busy_s > 0 and engine.stats().gap_s == 0
    _still_works(engine, runner)
    assert engine.stats().gap_s > 0
