"""A request resumed elsewhere goes on with the very tokens and text, at whatever token it was cut."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.runtime.fakes import EngineFactory
from tests.runtime.speculative.test_speculating_engine import SPECULATORS
from xllm_compile.runtime.engine import Engine
from xllm_compile.runtime.engine_config import EngineConfig
from xllm_compile.runtime.outputs import CompletionOutput, RequestMetrics, RequestOutput
from xllm_compile.runtime.resume import Resume
from xllm_compile.runtime.sampling_params import RequestOutputKind, SamplingParams
from xllm_compile.runtime.structured_output import ReasoningText, StructuredOutput
from xllm_compile.runtime.tokenizer import Tokenizer

PROMPT = [50, 51, 52, 53, 54, 55, 56]
OBJECT = StructuredOutput.json_schema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
# What each looks at: earlier tokens, text, random numbers, limits, a grammar.
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0, "ignore_eos": True},
    "penalties": {"temperature": 0, "repetition_penalty": 1.4, "presence_penalty": 0.7, "frequency_penalty": 0.6},
    "seeded": {"temperature": 1.0, "seed": 3, "frequency_penalty": 1.0, "logprobs": 2},
    "long seeded": {"temperature": 1.0, "seed": 11, "ignore_eos": True, "max_tokens": 50},
    "min_tokens": {"temperature": 0.7, "seed": 4, "top_p": 0.8, "min_tokens": 12, "stop_token_ids": list(range(100))},
    "stop": {"temperature": 1.0, "seed": 5, "stop": ["e", "th", "a b"], "min_tokens": 9},
    "bias": {"temperature": 0, "logit_bias": {7: 5.0, 90: 3.0}, "ignore_eos": True},
    "json": {"temperature": 1.0, "seed": 6, "structured": OBJECT},
    "greedy json": {"temperature": 0, "structured": OBJECT, "min_tokens": 4},
    "reasoning": {
        "temperature": 1.0,
        "seed": 8,
        "structured": StructuredOutput.choice(["yes", "no"], ReasoningText(start="<think>", end="</think>")),
    },
}
# Characters of two to four bytes, whose bytes are tokens of their own, and what looks like the stop string but is not.
TEXT = "d\u00e9j\u00e0 \u4f60\u597d \U0001f600\U0001f680 EN ENDIN the END of it"


def params_of(options: dict[str, Any]) -> SamplingParams:
    given: dict[str, Any] = {"max_tokens": 20, "output_kind": RequestOutputKind.DELTA}
    return SamplingParams(**given | options)


def drain(engine: Engine) -> list[CompletionOutput]:
    outputs: list[RequestOutput] = []
    while engine.has_work:
        outputs += engine.step()
    return [completion for output in outputs for completion in output.outputs]


def check_every_cut(whole: Sequence[CompletionOutput], resume_at: Callable[[Resume], list[CompletionOutput]]) -> None:
    """whole: the uninterrupted request, one token in each."""
    tokens = [token for part in whole for token in part.token_ids]
    logprobs = [entry for part in whole for entry in part.logprobs or ()]
    text = "".join(part.text for part in whole)
    assert len(whole) == len(tokens) > 3
    for cut in range(len(tokens) + 1):
        num_chars = sum(len(part.text) for part in whole[:cut])
        rest = resume_at(Resume(output_token_ids=tokens[:cut], num_text_chars=num_chars))
        assert [token for part in rest for token in part.token_ids] == tokens[cut:]
        assert "".join(part.text for part in rest) == text[num_chars:]
        assert [entry for part in rest for entry in part.logprobs or ()] == logprobs[cut:]
        assert (rest[-1].finish_reason, rest[-1].stop_reason) == (whole[-1].finish_reason, whole[-1].stop_reason)


@pytest.mark.parametrize("name", REQUESTS)
def test_every_cut_gives_the_rest(make_sync_engine: EngineFactory, make_engine: EngineFactory, name: str) -> None:
    params = params_of(REQUESTS[name])
    engine, _ = make_sync_engine()
    engine.add_request("whole", PROMPT, params)
    whole = drain(engine)
    resuming, _ = make_engine()

    def resume_at(resume: Resume) -> list[CompletionOutput]:
        resuming.add_request("rest", PROMPT, params, resume)
        return drain(resuming)

    check_every_cut(whole, resume_at)
    assert resuming.stats().kv_tokens_used == 0


@pytest.mark.parametrize("speculator", SPECULATORS)
@pytest.mark.parametrize("name", ["greedy", "penalties", "stop", "json"])
def test_speculation_changes_nothing(
    make_sync_engine: EngineFactory, make_engine: EngineFactory, name: str, speculator: str
) -> None:
    params = params_of(REQUESTS[name])
    engine, _ = make_sync_engine()
    engine.add_request("whole", PROMPT, params)
    resuming, _ = make_engine(make_speculator=SPECULATORS[speculator])

    def resume_at(resume: Resume) -> list[CompletionOutput]:
        resuming.add_request("rest", PROMPT, params, resume)
        return drain(resuming)

    check_every_cut(drain(engine), resume_at)


@pytest.mark.parametrize(
    "options",
    [
        {"stop": ["END of"]},
        {"stop": ["END of"], "include_stop_str_in_output": True},
        {"stop": ["ENDIN the E"]},
        # Cut in the middle of a character: it becomes U+FFFD.
        {"max_tokens": 7},
        {"max_tokens": 7, "stop": ["\ufffd"]},
        {},
    ],
)
def test_text_and_stop_strings_across_the_seam(
    make_sync_engine: EngineFactory, tokenizer: Tokenizer, options: dict[str, Any]
) -> None:
    engine, runner = make_sync_engine(max_model_len=128)
    runner.script(PROMPT, [*tokenizer.encode(TEXT), 2])
    params = params_of({"temperature": 0, "max_tokens": 90} | options)

    def resume_at(resume: Resume) -> list[CompletionOutput]:
        engine.add_request("rest", PROMPT, params, resume)
        return drain(engine)

    engine.add_request("whole", PROMPT, params)
    check_every_cut(drain(engine), resume_at)


@pytest.mark.parametrize("num_chars", [0, 3])
def test_text_that_the_client_lacks_comes_with_the_next_token(make_engine: EngineFactory, num_chars: int) -> None:
    engine, runner = make_engine()
    runner.script(PROMPT, [40, 41, 42, 43, 44, 45, 46, 47])
    engine.add_request("whole", PROMPT, params_of({"temperature": 0, "max_tokens": 8}))
    text = "".join(part.text for part in drain(engine))
    resume = Resume(output_token_ids=[40, 41, 42, 43, 44], num_text_chars=num_chars)
    engine.add_request("rest", PROMPT, params_of({"temperature": 0, "max_tokens": 8}), resume)
    assert "".join(part.text for part in drain(engine)) == text[num_chars:]


@pytest.mark.parametrize("kind", [RequestOutputKind.FINAL_ONLY, RequestOutputKind.CUMULATIVE])
def test_other_kinds_of_output_hold_only_what_is_new_too(make_engine: EngineFactory, kind: RequestOutputKind) -> None:
    engine, runner = make_engine()
    params = params_of({"temperature": 0, "ignore_eos": True, "max_tokens": 8, "output_kind": kind, "logprobs": 0})
    tokens = runner.greedy(PROMPT, 8)
    engine.add_request("rest", PROMPT, params, Resume(output_token_ids=tokens[:5]))
    last = drain(engine)[-1]
    assert last.token_ids == tokens[5:] and len(last.logprobs or ()) == 3


def test_a_resumed_request_may_be_preempted(make_engine: EngineFactory) -> None:
    engine, runner = make_engine(total_tokens=64, config=EngineConfig(admission_horizon=0))
    for index in range(4):
        prompt = [*PROMPT, 60 + index]
        done = runner.greedy(prompt, 6)
        engine.add_request(str(index), prompt, params_of(REQUESTS["greedy"]), Resume(output_token_ids=done))
    found: dict[str, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(output.outputs[0].token_ids)
    assert engine.stats().num_preemptions > 0
    for index in range(4):
        assert found[str(index)] == runner.greedy([*PROMPT, 60 + index], 20)[6:]


def test_the_cached_prefix_is_used_beyond_the_prompt(make_engine: EngineFactory) -> None:
    engine, runner = make_engine(block_tokens=4)
    engine.add_request("whole", PROMPT, params_of(REQUESTS["greedy"]))
    tokens = [token for part in drain(engine) for token in part.token_ids]
    before = sum(len(step.token_ids) for step in runner.steps)
    engine.add_request("rest", PROMPT, params_of(REQUESTS["greedy"]), Resume(output_token_ids=tokens[:14]))
    assert [token for part in drain(engine) for token in part.token_ids] == tokens[14:]
    # 7 + 14 tokens are 5 blocks and one: all but the last token is found, and 6 are generated.
    assert sum(len(step.token_ids) for step in runner.steps) - before == 6


def test_one_that_was_lost_without_a_token_goes_before_what_came_meanwhile(make_engine: EngineFactory) -> None:
    engine, _ = make_engine(config=EngineConfig(max_num_seqs=1, starvation_s=math.inf))
    lost = Resume(output_token_ids=[], is_begun=True)
    engine.add_request("running", PROMPT, params_of(REQUESTS["greedy"]))
    engine.step()
    engine.add_request("new", PROMPT, params_of(REQUESTS["greedy"]))
    # What it wants of its prompt is computed here like all of it.
    engine.add_request("lost", PROMPT, params_of({"prompt_logprobs": 1}), lost)
    ended: dict[str, RequestMetrics] = {}
    while engine.has_work:
        ended |= {output.request_id: output.metrics for output in engine.step() if output.finished}
    assert list(ended) == ["running", "lost", "new"]
    assert not ended["lost"].is_resumed, "its first token counts like any other's"


def test_times_begin_here(make_engine: EngineFactory) -> None:
    engine, runner = make_engine()
    engine.add_request("new", PROMPT, params_of(REQUESTS["greedy"]), Resume(output_token_ids=[]))
    engine.add_request("old", PROMPT, params_of(REQUESTS["greedy"]), Resume(output_token_ids=runner.greedy(PROMPT, 2)))
    found: dict[str, RequestMetrics] = {}
    while engine.has_work:
        found |= {output.request_id: output.metrics for output in engine.step()}
    assert not found["new"].is_resumed and found["old"].is_resumed
    assert found["old"].first_token_s is not None


def test_tokens_are_due_from_the_first_one_wherever_that_came_from(make_engine: EngineFactory) -> None:
    engine, runner = make_engine(clock=lambda: 100.0)
    tokens = runner.greedy(PROMPT, 3)

    def next_due_s(first_token_age_s: float | None) -> float:
        resume = Resume(output_token_ids=tokens, first_token_age_s=first_token_age_s)
        params = params_of(REQUESTS["greedy"] | {"tpot_slo_ms": 500})
        (sequence,) = engine.make_request("one", PROMPT, params, resume=resume).sequences
        return sequence.next_due_s

    # The fourth token, three targets after the first.
    assert next_due_s(1.25) == pytest.approx(100.25)
    assert next_due_s(None) == math.inf


@pytest.mark.parametrize(
    ("options", "resume", "message"),
    [
        ({"n": 2}, Resume(output_token_ids=[40]), "n=2 cannot be resumed"),
        ({"prompt_logprobs": 1}, Resume(output_token_ids=[40]), "prompt_logprobs=1 cannot be resumed"),
        ({"max_tokens": 2}, Resume(output_token_ids=[40] * 3), "3 output_token_ids, and max_tokens .* leave 2"),
        ({}, Resume(output_token_ids=[40, 2, 41]), r"ended \(stop\) with token 2 of 3"),
        ({}, Resume(output_token_ids=[40, 9999]), "resume.output_token_ids token id 9999 is outside the vocabulary"),
        ({}, Resume(output_token_ids=[40], num_text_chars=99), "num_text_chars=99 is above the 1 characters"),
        (
            {"structured": StructuredOutput.choice(["yes"])},
            Resume(output_token_ids=[40, 41]),
            "do not fit the request's structured output: token 40 is not allowed here",
        ),
    ],
)
def test_what_cannot_go_on_is_refused(
    make_sync_engine: EngineFactory, options: dict[str, Any], resume: Resume, message: str
) -> None:
    engine, _ = make_sync_engine()
    with pytest.raises(ValueError, match=message):
        engine.add_request("bad", PROMPT, params_of(options), resume)
    assert not engine.has_work


def test_a_resumed_end_is_reported_without_a_step(make_engine: EngineFactory, tokenizer: Tokenizer) -> None:
    engine, runner = make_engine()
    engine.add_request("done", PROMPT, params_of({}), Resume(output_token_ids=[40, 2], num_text_chars=1))
    (completion,) = drain(engine)
    assert (completion.finish_reason, completion.text, completion.token_ids) == ("stop", "", [])
    assert runner.steps == []
