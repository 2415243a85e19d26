"""The engine with its prefix cache, on a runner that reads every token back from the pages."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.fakes import EngineFactory, HistoryRunner, train_byte_level
from tests.runtime.test_engine import run
from xllm_compile.runtime.engine import Engine
from xllm_compile.runtime.outputs import RequestOutput
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.runtime.tokenizer import Tokenizer

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
LONG: dict[str, Any] = {"max_model_len": 200, "total_tokens": 800, "max_num_batched_tokens": 128, "block_tokens": 4}


def generate(engine: Engine, prompt: list[int], **params: Any) -> RequestOutput:
    engine.add_request("one", prompt, SamplingParams(**{"max_tokens": 5, **GREEDY, **params}))
    return run(engine)["one"]


def num_computed(runner: HistoryRunner) -> int:
    """Tokens of all steps so far."""
    return sum(len(step.token_ids) for step in runner.steps)


def test_a_prompt_that_came_before_is_computed_from_its_last_block_on(make_engine: EngineFactory) -> None:
    engine, runner = make_engine(**LONG)
    prompt = list(range(60, 110))
    first = generate(engine, prompt)
    before = num_computed(runner)
    second = generate(engine, prompt)
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 48)
    assert num_computed(runner) - before == 2 + 4
    assert second.outputs[0].token_ids == first.outputs[0].token_ids == runner.greedy(prompt, 5)
    stats = engine.stats()
    assert (stats.prefix_queried_tokens, stats.prefix_hit_tokens) == (100, 48)
    assert stats.kv_pages["free"] + stats.kv_pages["reusable"] == 800 // 3


def test_the_next_turn_finds_the_answer_of_the_last(make_engine: EngineFactory) -> None:
    engine, runner = make_engine(**LONG)
    prompt = list(range(60, 90))
    answer = generate(engine, prompt, max_tokens=11).outputs[0].token_ids
    turn = [*prompt, *answer, 7, 8, 9]
    # The last token of the answer was never computed: 40 tokens are ten blocks.
    second = generate(engine, turn)
    assert second.num_cached_tokens == 40
    assert second.outputs[0].token_ids == runner.greedy(turn, 5)


def test_prompt_logprobs_are_computed_anew(make_engine: EngineFactory) -> None:
    engine, _ = make_engine(**LONG)
    prompt = list(range(60, 90))
    first = generate(engine, prompt, prompt_logprobs=1)
    second = generate(engine, prompt, prompt_logprobs=1)
    assert second.num_cached_tokens == 0
    assert first.prompt_logprobs == second.prompt_logprobs is not None
    assert generate(engine, prompt).num_cached_tokens == 28


def test_equal_prompts_that_come_together_are_computed_once(make_engine: EngineFactory) -> None:
    engine, runner = make_engine(**LONG)
    prompt = list(range(60, 160))
    engine.add_request("n", prompt, SamplingParams(n=4, max_tokens=6, **GREEDY))
    output = run(engine)["n"]
    assert [completion.token_ids for completion in output.outputs] == [runner.greedy(prompt, 6)] * 4
    # One prompt, then of each other its last block; five more tokens of each.
    assert num_computed(runner) == 100 + 3 * 4 + 4 * 5
    assert output.num_cached_tokens == 0


def test_a_cached_prefix_is_shared_by_those_that_run(make_engine: EngineFactory) -> None:
    # 5 sequences of 110 tokens do not fit 260, but 100 of them are one.
    engine, runner = make_engine(**{**LONG, "total_tokens": 260, "max_num_seqs": 5})
    prefix = list(range(60, 160))
    generate(engine, prefix)
    tails = [[200 + index] * 3 for index in range(5)]
    for index, tail in enumerate(tails):
        engine.add_request(str(index), prefix + tail, SamplingParams(max_tokens=6, **GREEDY))
    most = 0
    finished: dict[str, RequestOutput] = {}
    while engine.has_work:
        finished |= {output.request_id: output for output in engine.step()}
        most = max(most, engine.stats().num_running)
    assert most == 5 and engine.stats().num_preemptions == 0
    for index, tail in enumerate(tails):
        assert finished[str(index)].outputs[0].token_ids == runner.greedy(prefix + tail, 6)
        assert finished[str(index)].num_cached_tokens == 100


def test_without_the_cache_nothing_is_shared(make_engine: EngineFactory) -> None:
    engine, runner = make_engine(**{**LONG, "block_tokens": None})
    prompt = list(range(60, 160))
    engine.add_request("n", prompt, SamplingParams(n=2, max_tokens=1, **GREEDY))
    run(engine)
    assert generate(engine, prompt).num_cached_tokens == 0
    assert num_computed(runner) == 300 + 4


def test_nothing_that_a_failed_step_should_have_written_is_found(make_engine: EngineFactory) -> None:
    engine, runner = make_engine(**LONG)
    prompt = list(range(60, 160))
    runner.fails = True
    engine.add_request("lost", prompt, SamplingParams(max_tokens=2, **GREEDY))
    with pytest.raises(RuntimeError, match="the device is gone"):
        run(engine)
    engine.abort("lost")
    runner.fails = False
    output = run_after_abort(engine, prompt)
    assert output.num_cached_tokens == 0
    assert output.outputs[0].token_ids == runner.greedy(prompt, 5)


def run_after_abort(engine: Engine, prompt: list[int]) -> RequestOutput:
    engine.add_request("one", prompt, SamplingParams(max_tokens=5, **GREEDY))
    return run(engine)["one"]


TOKENIZER = Tokenizer(train_byte_level(), eos_token_ids=[2])


@settings(max_examples=60)
@given(
    shapes=st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 60), st.integers(0, 2), st.integers(1, 20), st.integers(0, 12)),
        min_size=1,
        max_size=10,
    ),
    total_tokens=st.integers(102, 260),
    max_num_seqs=st.integers(1, 5),
    max_num_batched_tokens=st.integers(5, 90),
    aborted=st.sets(st.integers(0, 9), max_size=3),
    is_async=st.booleans(),
)
def test_any_mix_that_shares_beginnings_gives_what_each_gives_alone(
    shapes: list[tuple[int, int, int, int, int]],
    total_tokens: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    aborted: set[int],
    is_async: bool,
) -> None:
    engine, runner = EngineFactory(TOKENIZER, is_async=is_async)(
        max_model_len=100,
        total_tokens=total_tokens,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_tokens=4,
    )
    expected = {}
    arrivals: dict[int, list[int]] = {}
    for index, (beginning, length, tail, count, at) in enumerate(shapes):
        prompt = [*range(60 + 70 * beginning, 60 + 70 * beginning + length), 30 + tail]
        expected[str(index)] = (prompt, runner.greedy(prompt, count))
        arrivals.setdefault(at, []).append(index)
    final: dict[str, RequestOutput] = {}
    now = 0
    while arrivals or engine.has_work:
        for index in arrivals.pop(now, []):
            prompt, tokens = expected[str(index)]
            engine.add_request(str(index), prompt, SamplingParams(max_tokens=len(tokens), **GREEDY))
        for index in aborted & {now - 3}:
            engine.abort(str(index))
        for output in engine.step():
            final[output.request_id] = output
        now += 1
    engine.close()
    assert set(final) == set(expected)
    for request_id, output in final.items():
        found, tokens = output.outputs[0].token_ids, expected[request_id][1]
        assert found == tokens[: len(found)]
        if output.outputs[0].finish_reason != "abort":
            assert found == tokens
    assert engine.stats().kv_tokens_used == 0 and engine.stats().kv_pages["mapped"] == 0
