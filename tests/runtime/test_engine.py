import gc
import weakref
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.fakes import VOCAB_SIZE, EngineFactory, HistoryRunner, train_byte_level
from xllm_compile.runtime.engine import Engine
from xllm_compile.runtime.engine_config import EngineConfig
from xllm_compile.runtime.outputs import CompletionOutput, RequestOutput
from xllm_compile.runtime.policies.order import POLICIES, PolicyName
from xllm_compile.runtime.policies.queue_bound import QueueFullError
from xllm_compile.runtime.sampling_params import RequestOutputKind, SamplingParams
from xllm_compile.runtime.tokenizer import Tokenizer

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
# Admits what fits now, so that memory runs short later.
EAGER = EngineConfig(admission_horizon=0)
PROMPT = [40, 41, 42, 43, 44]


def run(engine: Engine) -> dict[str, RequestOutput]:
    """Step to the end; the last output of each request."""
    final = {}
    while engine.has_work:
        for output in engine.step():
            final[output.request_id] = output
    assert engine.stats().kv_tokens_used == 0
    assert engine.stats().num_running == engine.stats().num_waiting == 0
    return final


def run_one(engine: Engine, prompt: str | list[int] = PROMPT, **params) -> CompletionOutput:
    engine.add_request("one", prompt, SamplingParams(**params))
    return run(engine)["one"].outputs[0]


def prompts(count: int) -> list[list[int]]:
    return [[50 + index, *range(60, 60 + 3 * index)] for index in range(count)]


def test_greedy_decoding_reads_back_its_own_history(make_engine: EngineFactory) -> None:
    engine, runner = make_engine()
    completion = run_one(engine, max_tokens=20, **GREEDY)
    assert completion.token_ids == runner.greedy(PROMPT, 20)
    assert completion.finish_reason == "length" and completion.stop_reason is None
    assert completion.logprobs is None and completion.cumulative_logprob is None


def test_text_prompts_are_encoded_and_shown(make_engine: EngineFactory) -> None:
    engine, runner = make_engine()
    engine.add_request("one", "the fox", SamplingParams(max_tokens=3, **GREEDY))
    output = run(engine)["one"]
    assert output.prompt == "the fox"
    assert output.prompt_token_ids == engine.tokenizer.encode("the fox")
    assert output.outputs[0].token_ids == runner.greedy(output.prompt_token_ids, 3)
    assert output.outputs[0].text == engine.tokenizer.decode(output.outputs[0].token_ids)


@pytest.mark.parametrize("chunk", [2, 3, 7, 32])
def test_chunked_prefill_equals_unchunked(make_engine: EngineFactory, chunk: int) -> None:
    engine, runner = make_engine(max_num_batched_tokens=chunk, max_num_seqs=2)
    prompt = list(range(100, 123))
    engine.add_request("one", prompt, SamplingParams(max_tokens=5, logprobs=2, prompt_logprobs=1, **GREEDY))
    output = run(engine)["one"]
    assert output.outputs[0].token_ids == runner.greedy(prompt, 5)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(prompt)
    for at in range(1, len(prompt)):
        entry = output.prompt_logprobs[at]
        expected = runner.row(prompt[:at]).log_softmax(0)
        assert entry is not None
        assert entry[prompt[at]].logprob == pytest.approx(expected[prompt[at]].item(), abs=1e-5)
        best = int(expected.argmax())
        assert entry[best].rank == 1 and entry[best].decoded_token == engine.tokenizer.token_text(best)


def test_many_requests_batch_and_each_stays_itself(make_engine: EngineFactory) -> None:
    engine, runner = make_engine(max_num_seqs=4)
    for index, prompt in enumerate(prompts(10)):
        engine.add_request(str(index), prompt, SamplingParams(max_tokens=4 + index, **GREEDY))
    final = run(engine)
    for index, prompt in enumerate(prompts(10)):
        assert final[str(index)].outputs[0].token_ids == runner.greedy(prompt, 4 + index)
    assert max(len(step.slot) for step in runner.steps) == 4


def test_preemption_keeps_every_stream_identical(make_engine: EngineFactory) -> None:
    engine, runner = make_engine(config=EAGER, max_model_len=64, total_tokens=70, max_num_batched_tokens=9)
    streamed: dict[str, list[int]] = defaultdict(list)
    texts: dict[str, str] = defaultdict(str)
    for index, prompt in enumerate(prompts(8)):
        params = SamplingParams(max_tokens=25, output_kind=RequestOutputKind.DELTA, prompt_logprobs=0, **GREEDY)
        engine.add_request(str(index), prompt, params)
    prompt_logprobs = {}
    while engine.has_work:
        for output in engine.step():
            if output.prompt_logprobs is not None:
                assert output.request_id not in prompt_logprobs
                prompt_logprobs[output.request_id] = output.prompt_logprobs
            for completion in output.outputs:
                streamed[output.request_id] += completion.token_ids
                texts[output.request_id] += completion.text
    assert engine.stats().num_preemptions > 5
    for index, prompt in enumerate(prompts(8)):
        assert streamed[str(index)] == runner.greedy(prompt, 25)
        assert texts[str(index)] == engine.tokenizer.decode(streamed[str(index)])
        assert len(prompt_logprobs[str(index)]) == len(prompt)
    stats = engine.stats()
    assert stats.num_prompt_tokens == sum(map(len, prompts(8)))
    assert stats.num_generated_tokens == 8 * 25
    # Rotary scaling by length must see a token computed again as it saw it the first time.
    by_length = {len(prompt) for prompt in prompts(8)}
    for step in runner.steps:
        for length, position in zip(step.rope_len.tolist(), step.positions.tolist(), strict=True):
            assert length == position + 1 or (length in by_length and position < length)


def test_several_preempted_in_one_step_keep_their_order(make_sync_engine: EngineFactory) -> None:
    engine, runner = make_sync_engine(config=EAGER, max_model_len=64, total_tokens=64)
    engine.add_request("a", [50] * 30, SamplingParams(max_tokens=None, **GREEDY))
    while engine.stats().kv_tokens_used < 61:
        engine.step()
    engine.add_request("b", [51], SamplingParams(max_tokens=3, **GREEDY))
    engine.add_request("c", [52], SamplingParams(max_tokens=3, **GREEDY))
    engine.step()
    assert (engine.stats().kv_tokens_used, engine.stats().num_running) == (64, 3)
    (last_of_a,) = engine.step()
    assert (engine.stats().num_preemptions, engine.stats().num_waiting) == (2, 2)
    assert last_of_a.outputs[0].token_ids == runner.greedy([50] * 30, 34)
    assert [output.request_id for output in engine.step()] == ["b", "c"]
    final = run(engine)
    assert final["b"].outputs[0].token_ids == runner.greedy([51], 3)
    assert final["c"].outputs[0].token_ids == runner.greedy([52], 3)


def test_seeded_sampling_survives_preemption_and_company(make_engine: EngineFactory) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=7, max_tokens=25, ignore_eos=True)
    alone, _ = make_engine()
    alone.add_request("one", PROMPT, params)
    expected = run(alone)["one"].outputs[0].token_ids
    crowded, _ = make_engine(config=EAGER, total_tokens=66, max_num_batched_tokens=9)
    for index, prompt in enumerate(prompts(5)):
        crowded.add_request(str(index), prompt, SamplingParams(max_tokens=30, **GREEDY))
    crowded.add_request("one", PROMPT, params)
    output = run(crowded)["one"]
    assert output.metrics.num_preemptions > 0
    assert output.outputs[0].token_ids == expected


def test_n_completions_of_one_prompt(make_engine: EngineFactory) -> None:
    engine, _ = make_engine()
    engine.add_request("one", PROMPT, SamplingParams(n=3, seed=1, max_tokens=6, ignore_eos=True))
    output = run(engine)["one"]
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 3
    first = run_one(engine, seed=1, max_tokens=6, ignore_eos=True)
    assert first.token_ids == output.outputs[0].token_ids


def test_eos_stops_without_being_text(make_engine: EngineFactory) -> None:
    engine, runner = make_engine()
    fox = engine.tokenizer.encode("fox")
    runner.script(PROMPT, [*fox, 2, 9])
    completion = run_one(engine, temperature=0, max_tokens=9)
    assert completion.token_ids == [*fox, 2]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("fox", "stop", None)
    ignoring = run_one(engine, temperature=0, max_tokens=len(fox) + 2, ignore_eos=True)
    assert ignoring.token_ids == [*fox, 2, 9] and ignoring.finish_reason == "length"


def test_stop_token_ids(make_engine: EngineFactory) -> None:
    engine, runner = make_engine()
    a, b = engine.tokenizer.encode("a") + engine.tokenizer.encode("b")
    runner.script(PROMPT, [a, b, a])
    completion = run_one(engine, stop_token_ids=[b], temperature=0)
    assert (completion.token_ids, completion.text) == ([a, b], "a")
    assert (completion.finish_reason, completion.stop_reason) == ("stop", b)
    assert run_one(engine, stop_token_ids=[b], temperature=0, include_stop_str_in_output=True).text == "ab"


def test_min_tokens_holds_off_every_kind_of_stop(make_engine: EngineFactory) -> None:
    engine, runner = make_engine()
    a, b = engine.tokenizer.encode("a") + engine.tokenizer.encode("b")
    runner.script(PROMPT, [a, b, a, b, a])
    completion = run_one(engine, stop=["b"], min_tokens=2, temperature=0, max_tokens=5)
    assert (completion.token_ids, completion.text) == ([a, b, a, b], "aba")
    masked = run_one(engine, stop_token_ids=[a], min_tokens=2, temperature=0, max_tokens=5)
    assert a not in masked.token_ids[:2]


def test_a_stop_string_across_tokens_in_streamed_text(make_engine: EngineFactory) -> None:
    engine, runner = make_engine()
    ids = [token for char in "one ENDtwo" for token in engine.tokenizer.encode(char)]
    runner.script(PROMPT, ids)
    params = SamplingParams(stop=["END", "nothing"], temperature=0, output_kind=RequestOutputKind.DELTA)
    engine.add_request("one", PROMPT, params)
    parts: list[CompletionOutput] = []
    while engine.has_work:
        parts += [output.outputs[0] for output in engine.step()]
    # "n" may begin "nothing", "E" and "EN" may begin "END".
    assert [part.text for part in parts] == ["o", "", "ne", " ", "", "", ""]
    assert [token for part in parts for token in part.token_ids] == ids[: len("one END")]
    assert (parts[-1].finish_reason, parts[-1].stop_reason) == ("stop", "END")
    assert run_one(engine, stop="END", temperature=0, include_stop_str_in_output=True).text == "one END"


def test_held_back_text_comes_out_at_the_length_limit(make_engine: EngineFactory) -> None:
    engine, runner = make_engine()
    ids = [token for char in "aEN" for token in engine.tokenizer.encode(char)]
    runner.script(PROMPT, ids)
    completion = run_one(engine, stop=["END"], temperature=0, max_tokens=3)
    assert (completion.text, completion.finish_reason) == ("aEN", "length")


@pytest.mark.parametrize("max_tokens", [None, 1000])
def test_max_model_len_ends_generation(make_engine: EngineFactory, max_tokens: int | None) -> None:
    engine, runner = make_engine(max_model_len=16, total_tokens=16)
    completion = run_one(engine, max_tokens=max_tokens, **GREEDY)
    assert completion.finish_reason == "length"
    assert completion.token_ids == runner.greedy(PROMPT, 16 - len(PROMPT))


def test_logprobs_of_output_tokens(make_engine: EngineFactory) -> None:
    engine, runner = make_engine()
    completion = run_one(engine, logprobs=2, seed=3, max_tokens=4, ignore_eos=True)
    assert completion.logprobs is not None and len(completion.logprobs) == 4
    total = 0.0
    for at, entry in enumerate(completion.logprobs):
        expected = runner.row([*PROMPT, *completion.token_ids[:at]]).log_softmax(0)
        chosen = entry[completion.token_ids[at]]
        assert chosen.logprob == pytest.approx(expected[completion.token_ids[at]].item(), abs=1e-5)
        assert {rank for rank in (value.rank for value in entry.values()) if rank <= 2} == {1, 2}
        total += chosen.logprob
    assert completion.cumulative_logprob == pytest.approx(total)


def test_output_kinds_tell_the_same_story(make_engine: EngineFactory) -> None:
    seen: dict[RequestOutputKind, list[RequestOutput]] = {}
    for kind in RequestOutputKind:
        engine, _ = make_engine()
        params = SamplingParams(
            n=2, seed=5, max_tokens=5, ignore_eos=True, logprobs=0, prompt_logprobs=0, output_kind=kind
        )
        engine.add_request("one", PROMPT, params)
        seen[kind] = []
        while engine.has_work:
            seen[kind] += engine.step()
    (final,) = seen[RequestOutputKind.FINAL_ONLY]
    assert seen[RequestOutputKind.CUMULATIVE][-1].outputs == final.outputs
    assert seen[RequestOutputKind.CUMULATIVE][-1].prompt_logprobs == final.prompt_logprobs
    assert [len(output.outputs[0].token_ids) for output in seen[RequestOutputKind.CUMULATIVE]] == [1, 2, 3, 4, 5]
    deltas = seen[RequestOutputKind.DELTA]
    for index, whole in enumerate(final.outputs):
        pieces = [piece for output in deltas for piece in output.outputs if piece.index == index]
        assert [token for piece in pieces for token in piece.token_ids] == whole.token_ids
        assert "".join(piece.text for piece in pieces) == whole.text
        assert [entry for piece in pieces for entry in piece.logprobs or ()] == whole.logprobs
        assert [piece.finish_reason for piece in pieces] == [None] * 4 + ["length"]
    assert [output.prompt_logprobs is not None for output in deltas] == [True] + [False] * 4


def test_outputs_already_given_do_not_change(make_sync_engine: EngineFactory) -> None:
    engine, _ = make_sync_engine()
    engine.add_request("one", PROMPT, SamplingParams(max_tokens=3, logprobs=0, **GREEDY))
    (first,) = engine.step()
    run(engine)
    assert len(first.outputs[0].token_ids) == 1
    assert first.outputs[0].logprobs is not None and len(first.outputs[0].logprobs) == 1
    assert first.outputs[0].finish_reason is None and not first.finished


def test_metrics_come_from_the_clock_in_order(make_engine: EngineFactory) -> None:
    engine, _ = make_engine()
    engine.add_request("one", PROMPT, SamplingParams(max_tokens=3, **GREEDY))
    metrics = run(engine)["one"].metrics
    assert metrics.scheduled_s and metrics.first_token_s and metrics.last_token_s
    assert metrics.arrival_s < metrics.scheduled_s < metrics.first_token_s < metrics.last_token_s


def test_steps_of_a_request_are_counted_by_their_graphs(make_engine: EngineFactory) -> None:
    engine, runner = make_engine(max_num_batched_tokens=8, max_num_seqs=2)
    prompt = list(range(100, 119))
    engine.add_request("one", prompt, SamplingParams(max_tokens=4, **GREEDY))
    assert run(engine)["one"].metrics.graph_steps == {"dynamic": 3, "exact": 3}
    # What is under way when a request ends is no step of its.
    runner.script(prompt, [70, 71, 72])
    engine.add_request("two", prompt, SamplingParams(max_tokens=9, stop_token_ids=[71], **GREEDY))
    assert run(engine)["two"].metrics.graph_steps == {"dynamic": 3, "exact": 1}


@pytest.mark.parametrize("num_steps_before", range(12))
def test_abort_at_every_moment(make_engine: EngineFactory, num_steps_before: int) -> None:
    engine, runner = make_engine(total_tokens=70, max_num_batched_tokens=6, max_num_seqs=3)
    for index, prompt in enumerate(prompts(5)):
        engine.add_request(str(index), prompt, SamplingParams(n=2 if index == 2 else 1, max_tokens=6, **GREEDY))
    final: dict[str, RequestOutput] = {}
    for _ in range(num_steps_before):
        final |= {output.request_id: output for output in engine.step()}
    was_finished = "2" in final and final["2"].finished
    engine.abort("2")
    engine.abort("2")
    engine.abort("unknown")
    final |= run(engine)
    assert all(output.finished for output in final.values()) and len(final) == 5
    for completion in final["2"].outputs:
        assert completion.token_ids == runner.greedy(prompts(5)[2], 6)[: len(completion.token_ids)]
    if not was_finished:
        assert "abort" in {completion.finish_reason for completion in final["2"].outputs}
    for index in (0, 1, 3, 4):
        assert final[str(index)].outputs[0].token_ids == runner.greedy(prompts(5)[index], 6)
    assert engine.stats().num_aborted == (not was_finished)


def test_nan_logits_end_their_request_and_no_other(make_engine: EngineFactory) -> None:
    engine, runner = make_engine(poison=44)
    engine.add_request("bad", PROMPT, SamplingParams(max_tokens=4, **GREEDY))
    engine.add_request("good", PROMPT[:-1], SamplingParams(max_tokens=1, **GREEDY))
    final = run(engine)
    (bad,) = final["bad"].outputs
    assert bad.finish_reason == "abort" and bad.token_ids == []
    assert isinstance(bad.stop_reason, str) and "request bad failed" in bad.stop_reason and "NaN" in bad.stop_reason
    assert final["good"].outputs[0].token_ids == runner.greedy(PROMPT[:-1], 1)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt has 0 tokens"),
        ("", {}, "the prompt has 0 tokens"),
        ([5] * 64, {}, "the prompt has 64 tokens and max_model_len=64"),
        ([5, VOCAB_SIZE], {}, f"prompt token id {VOCAB_SIZE} is outside the vocabulary of {VOCAB_SIZE}"),
        ([-1, 5], {}, "prompt token id -1 is outside"),
        ([5], {"logit_bias": {4000: 1.0}}, "logit_bias token id 4000 is outside"),
    ],
)
def test_bad_requests_are_refused(
    make_engine: EngineFactory, prompt: str | list[int], params: dict, message: str
) -> None:
    engine, _ = make_engine()
    with pytest.raises(ValueError, match=message):
        engine.add_request("one", prompt, SamplingParams(**params))
    assert not engine.has_work


def test_ids_in_use_are_refused(make_engine: EngineFactory) -> None:
    engine, _ = make_engine()
    engine.add_request("one", PROMPT, SamplingParams())
    with pytest.raises(ValueError, match="request_id='one' is already in use"):
        engine.add_request("one", PROMPT, SamplingParams())
    engine.abort("one")
    run(engine)
    engine.add_request("one", PROMPT, SamplingParams())


def test_the_waiting_queue_is_bounded(make_sync_engine: EngineFactory) -> None:
    engine, _ = make_sync_engine(config=EngineConfig(max_waiting=3, max_waiting_tokens=24))
    engine.add_request("a", PROMPT, SamplingParams(n=2, max_tokens=1))
    with pytest.raises(QueueFullError, match="max_waiting=3"):
        engine.add_request("b", PROMPT, SamplingParams(n=2))
    with pytest.raises(QueueFullError, match="max_waiting_tokens=24"):
        engine.add_request("c", [5] * 20, SamplingParams())
    engine.step()
    engine.add_request("c", [5] * 20, SamplingParams(max_tokens=1))
    assert set(run(engine)) == {"c"}


def test_config_limits_the_runner(make_engine: EngineFactory) -> None:
    engine, runner = make_engine(config=EngineConfig(max_num_seqs=2, max_num_batched_tokens=4))
    for index, prompt in enumerate(prompts(4)):
        engine.add_request(str(index), prompt, SamplingParams(max_tokens=3, **GREEDY))
    run(engine)
    assert max(len(step.slot) for step in runner.steps) == 2
    assert max(len(step.token_ids) for step in runner.steps) == 4
    with pytest.raises(ValueError, match="max_num_seqs=0 must be at least 1"):
        EngineConfig(max_num_seqs=0)


def test_stats_count(make_sync_engine: EngineFactory) -> None:
    engine, _ = make_sync_engine(max_num_seqs=1)
    engine.add_request("a", PROMPT, SamplingParams(max_tokens=3, **GREEDY))
    engine.add_request("b", PROMPT, SamplingParams(max_tokens=3, **GREEDY))
    engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_steps) == (1, 1, 1)
    assert (stats.kv_tokens_used, stats.kv_tokens_total) == (5, 512)
    assert (stats.num_prompt_tokens, stats.num_generated_tokens) == (5, 1)
    assert stats.graph_cache.by_outcome()["exact"] == 1


def test_online_requests_take_the_places_of_offline_ones(make_engine: EngineFactory) -> None:
    engine, _ = make_engine(max_num_seqs=2)
    batch = SamplingParams(max_tokens=30, offline=True, **GREEDY)
    for name in ("x", "y", "z"):
        engine.add_request(name, [ord(name)] * 4, batch)
    while engine.stats().num_generated_tokens < 6:
        engine.step()
    stats = engine.stats()
    assert (stats.num_offline_running, stats.num_offline_waiting) == (2, 1)
    engine.add_request("a", PROMPT, SamplingParams(max_tokens=3, **GREEDY))
    order = []
    while engine.has_work:
        order += [output.request_id for output in engine.step() if output.finished]
    assert order == ["a", "x", "y", "z"]
    assert engine.stats().num_preemptions == engine.stats().num_offline_preemptions == 1


def test_offline_prompts_keep_the_instances_target_where_nobody_decodes(make_engine: EngineFactory) -> None:
    def first_chunk(tpot_slo_ms: float | None) -> int:
        config = EngineConfig(tpot_slo_ms=tpot_slo_ms)
        engine, runner = make_engine(config=config, max_num_batched_tokens=64, max_model_len=128)
        engine.add_request("a", [1] * 60, SamplingParams(max_tokens=1, offline=True, **GREEDY))
        while not runner.steps:
            engine.step()
        return len(runner.steps[0].token_ids)

    assert first_chunk(None) == 60
    # No step is that short: the least that moves on.
    assert first_chunk(1e-6) == 32


def test_preempted_offline_requests_end_as_if_alone(make_engine: EngineFactory) -> None:
    engine, runner = make_engine(max_num_seqs=2)
    for name in ("x", "y"):
        engine.add_request(name, [ord(name)] * 4, SamplingParams(max_tokens=20, offline=True, **GREEDY))
    for index in range(3):
        for _ in range(6):
            engine.step()
        engine.add_request(str(index), PROMPT, SamplingParams(max_tokens=2, **GREEDY))
    final = run(engine)
    assert engine.stats().num_offline_preemptions > 1
    for name in ("x", "y"):
        assert final[name].outputs[0].token_ids == runner.greedy([ord(name)] * 4, 20)


def test_a_refusal_says_when_to_come_back(make_sync_engine: EngineFactory) -> None:
    engine, _ = make_sync_engine(config=EngineConfig(max_waiting=4), max_num_seqs=2)
    for index in range(4):
        engine.add_request(str(index), [40 + index] * 20, SamplingParams(max_tokens=40, **GREEDY))
    waits = []
    for num_more in (1, 3):
        with pytest.raises(QueueFullError) as caught:
            engine.add_request("more", PROMPT, SamplingParams(n=num_more))
        waits.append(caught.value.retry_after_s)
    assert 0 < waits[0] < waits[1]


def test_the_server_has_targets_for_requests_that_name_none(make_engine: EngineFactory) -> None:
    engine, _ = make_engine(config=EngineConfig(ttft_slo_ms=300, tpot_slo_ms=20))
    engine.add_request("a", PROMPT, SamplingParams(max_tokens=2, tpot_slo_ms=50, **GREEDY))
    metrics = run(engine)["a"].metrics
    assert (metrics.ttft_slo_s, metrics.tpot_slo_s) == (0.3, 0.05)
    engine.add_request("b", PROMPT, SamplingParams(max_tokens=2, tpot_slo_ms=50, offline=True, **GREEDY))
    metrics = run(engine)["b"].metrics
    assert (metrics.ttft_slo_s, metrics.tpot_slo_s) == (None, 0.05)
    for fields in ({"scheduling_policy": "lifo"}, {"ttft_slo_ms": 0.0}, {"starvation_s": -1.0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            EngineConfig(**fields)


@pytest.mark.parametrize(
    ("config", "first"),
    [
        (EngineConfig(), "late"),
        (EngineConfig(ttft_slo_ms=1e6), "in time"),
        (EngineConfig(ttft_slo_ms=1e6, scheduling_policy="fcfs"), "late"),
        (EngineConfig(scheduling_policy="deadline"), "in time"),
    ],
)
def test_with_a_target_of_the_server_late_requests_let_others_go_first(
    make_sync_engine: EngineFactory, config: EngineConfig, first: str
) -> None:
    engine, _ = make_sync_engine(config=config, max_num_seqs=1)
    for name, ttft_slo_ms in (("late", 1e-6), ("in time", 1e6)):
        engine.add_request(name, PROMPT, SamplingParams(max_tokens=2, ttft_slo_ms=ttft_slo_ms, **GREEDY))
    engine.add_request("offline", PROMPT, SamplingParams(max_tokens=2, ttft_slo_ms=1e-6, offline=True, **GREEDY))
    stats = engine.stats()
    assert stats.num_waiting_tokens == 3 * len(PROMPT)
    assert stats.num_late_waiting_tokens == (len(PROMPT) if first == "in time" else 0)
    ended: list[str] = []
    while engine.has_work:
        ended += [output.request_id for output in engine.step() if output.finished]
    assert ended[0] == first and len(ended) == 3
    assert engine.stats().num_late_waiting_tokens == 0


TOKENIZER = Tokenizer(train_byte_level(), eos_token_ids=[2])


@settings(max_examples=100)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 25), st.integers(1, 25), st.integers(0, 10)), min_size=1, max_size=8),
    total_tokens=st.integers(32, 120),
    max_num_seqs=st.integers(1, 5),
    extra_tokens=st.integers(0, 20),
    aborted=st.sets(st.integers(0, 7)),
    is_async=st.booleans(),
    policy=st.sampled_from(POLICIES),
    horizon=st.sampled_from([0, 4, 256]),
)
def test_any_mix_of_requests_gives_what_each_gives_alone(
    shapes: list[tuple[int, int, int]],
    total_tokens: int,
    max_num_seqs: int,
    extra_tokens: int,
    aborted: set[int],
    is_async: bool,
    policy: PolicyName,
    horizon: int,
) -> None:
    engine, runner = EngineFactory(TOKENIZER, is_async=is_async)(
        config=EngineConfig(scheduling_policy=policy, admission_horizon=horizon),
        max_model_len=32,
        total_tokens=total_tokens,
        num_slots=max_num_seqs,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + extra_tokens,
    )
    _compare_with_greedy(engine, runner, shapes, aborted)


def _compare_with_greedy(
    engine: Engine, runner: HistoryRunner, shapes: list[tuple[int, int, int]], aborted: set[int]
) -> None:
    arrivals = sorted(range(len(shapes)), key=lambda index: shapes[index][2])
    final: dict[str, RequestOutput] = {}
    now = 0
    while arrivals or engine.has_work:
        while arrivals and shapes[arrivals[0]][2] <= now:
            index = arrivals.pop(0)
            length, max_tokens, _ = shapes[index]
            wishes: dict[str, Any] = {
                "priority": index % 3,
                "offline": index % 2 == 0,
                "ttft_slo_ms": 1e4 * (index % 4) or None,
            }
            params = SamplingParams(max_tokens=max_tokens, **wishes, **GREEDY)
            engine.add_request(str(index), [50 + index] * length, params)
        if now == 9:
            for index in aborted:
                engine.abort(str(index))
        final |= {output.request_id: output for output in engine.step()}
        now += 1
    assert len(final) == len(shapes) and engine.stats().kv_tokens_used == 0
    for index, (length, max_tokens, _) in enumerate(shapes):
        (completion,) = final[str(index)].outputs
        expected = runner.greedy([50 + index] * length, min(max_tokens, 32 - length))
        if completion.finish_reason == "abort":
            assert index in aborted
            assert completion.token_ids == expected[: len(completion.token_ids)]
        else:
            assert completion.token_ids == expected


def test_a_finished_request_is_gone_without_the_collector(make_engine: EngineFactory) -> None:
    engine, _ = make_engine()
    request = engine.make_request("one", PROMPT, SamplingParams(n=2, max_tokens=3, **GREEDY))
    seen = [weakref.ref(sequence.sampling) for sequence in request.sequences]
    engine.add(request)
    del request
    gc.disable()
    try:
        run(engine)
        engine.settle()
        assert [ref() for ref in seen] == [None, None]
    finally:
        gc.enable()
