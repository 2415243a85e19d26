"""Requests with structured outputs in the engine: every output fits, alone, together and step by step."""

import json
from typing import Any

import jsonschema
import pytest

from tests.runtime.fakes import EngineFactory
from xllm_compile.benchmarks.random_schemas import random_schema
from xllm_compile.runtime.engine import Engine
from xllm_compile.runtime.outputs import RequestOutput
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.runtime.structured_output import ReasoningText, StructuredOutput


def run(engine: Engine) -> dict[str, RequestOutput]:
    final: dict[str, RequestOutput] = {}
    while engine.has_work:
        final |= {output.request_id: output for output in engine.step()}
    return final


def add(engine: Engine, name: str, structured: StructuredOutput | None, **options: Any) -> None:
    engine.add_request(name, [40 + len(name)], SamplingParams(structured=structured, **{"max_tokens": 900} | options))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_a_random_model_writes_under_a_random_schema_validates(
    make_engine: EngineFactory, temperature: float
) -> None:
    engine, _ = make_engine(max_model_len=1024, total_tokens=8192)
    schemas = {f"s{seed}": random_schema(seed) for seed in range(12)}
    for seed, (name, schema) in enumerate(schemas.items()):
        add(engine, name, StructuredOutput.json_schema(schema), temperature=temperature, seed=seed)
    for name, output in run(engine).items():
        (completion,) = output.outputs
        assert completion.finish_reason == "stop", completion.text
        jsonschema.validate(json.loads(completion.text), schemas[name])


def test_scheduling_does_not_change_the_output(make_sync_engine: EngineFactory, tokenizer: Any) -> None:
    def texts(*, is_async: bool, total_tokens: int) -> list[list[str]]:
        engine, _ = EngineFactory(tokenizer, is_async=is_async)(max_model_len=256, total_tokens=total_tokens)
        structured = StructuredOutput.json_schema(random_schema(3))
        add(engine, "greedy", structured, temperature=0, max_tokens=60)
        add(engine, "seeded", structured, seed=1, n=3, max_tokens=60, logprobs=1)
        add(engine, "penalised", structured, seed=2, repetition_penalty=1.3, logit_bias={90: 50.0}, max_tokens=60)
        add(engine, "free", None, seed=3, max_tokens=60)
        final = run(engine)
        return [[completion.text for completion in final[name].outputs] for name in sorted(final)]

    reference = texts(is_async=False, total_tokens=4096)
    assert texts(is_async=True, total_tokens=4096) == reference
    # Too small for all of them: some are preempted and computed again.
    assert texts(is_async=True, total_tokens=256) == reference


def test_reasoning_comes_first_and_free(make_engine: EngineFactory, tokenizer: Any) -> None:
    engine, runner = make_engine(max_model_len=128)
    runner.script([43], tokenizer.encode("the <think> end</think>\nno idea"))
    structured = StructuredOutput.choice(["yes", "no"], ReasoningText(start="<think>", end="</think>", is_open=True))
    add(engine, "abc", structured, temperature=0, max_tokens=100)
    (completion,) = run(engine)["abc"].outputs
    assert completion.text == "the <think> end</think>\nno"
    assert completion.finish_reason == "stop"


def test_a_request_that_leaves_nothing_to_choose_fails_alone(make_engine: EngineFactory) -> None:
    engine, _ = make_engine()
    add(engine, "bad", StructuredOutput.choice(["a"]), min_tokens=5, max_tokens=10)
    add(engine, "good", StructuredOutput.choice(["the end"]), max_tokens=10)
    final = run(engine)
    assert final["good"].outputs[0].text == "the end"
    assert "the structured output" in str(final["bad"].outputs[0].stop_reason)


def test_what_cannot_be_compiled_is_refused_when_the_request_is_made(make_sync_engine: EngineFactory) -> None:
    engine, _ = make_sync_engine()
    with pytest.raises(ValueError, match="regex cannot be used"):
        add(engine, "bad", StructuredOutput(kind="regex", source="["))
    assert not engine.has_work
