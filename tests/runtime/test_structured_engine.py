"""Requests with structured outputs in the engine: every output fits, alone, together and step by step."""

import asyncio
import json
import threading
from typing import Any

import jsonschema
import pytest

from tests.runtime.fakes import EngineFactory
from xllm_compile.benchmarks.random_schemas import random_schema
from xllm_compile.runtime import grammar
from xllm_compile.runtime.async_engine import AsyncEngine
from xllm_compile.runtime.engine import Engine
from xllm_compile.runtime.grammar import Grammar, GrammarCompiler
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


def test_a_grammar_that_becomes_too_complex_fails_its_request_alone(
    make_engine: EngineFactory, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "NUM_PROBE_TOKENS", 0)
    engine, runner = make_engine(max_model_len=256)
    runner.script([43], tokenizer.encode("a") * 200)
    nested = StructuredOutput(kind="regex", source="((a{0,100}){0,100}){0,100}")
    add(engine, "bad", nested, max_tokens=200, temperature=0)
    add(engine, "good", StructuredOutput.choice(["the end"]), max_tokens=10)
    final = run(engine)
    assert final["good"].outputs[0].text == "the end"
    assert final["bad"].outputs[0].finish_reason == "abort"
    assert "the structured output cannot go on: " in str(final["bad"].outputs[0].stop_reason)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_complete_output_ends_before_min_tokens(make_engine: EngineFactory, temperature: float) -> None:
    engine, _ = make_engine()
    add(engine, "short", StructuredOutput.choice(["abc"]), min_tokens=20, max_tokens=30, temperature=temperature)
    add(engine, "longer", StructuredOutput(kind="regex", source="z*"), min_tokens=20, max_tokens=20, temperature=0)
    final = run(engine)
    assert (final["short"].outputs[0].text, final["short"].outputs[0].finish_reason) == ("abc", "stop")
    assert set(final["longer"].outputs[0].text) == {"z"}
    assert len(final["longer"].outputs[0].token_ids) == 20


async def test_others_go_on_while_a_grammar_is_compiled(
    make_sync_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    compile_now = GrammarCompiler.compile

    def compile_later(compiler: GrammarCompiler, structured: StructuredOutput) -> Grammar:
        assert go_on.wait(timeout=60)
        return compile_now(compiler, structured)

    monkeypatch.setattr(GrammarCompiler, "compile", compile_later)
    engine, _ = make_sync_engine()
    server = AsyncEngine(engine)
    try:
        params = SamplingParams(structured=StructuredOutput.choice(["yes"]), max_tokens=9)
        waiting = asyncio.create_task(server.submit("structured", [40], params))
        free = SamplingParams(max_tokens=4, ignore_eos=True)
        assert [output.finished async for output in server.generate("free", [41], free)][-1]
        assert not waiting.done()
        go_on.set()
        assert [output.outputs[0].text async for output in await waiting][-1] == "yes"
    finally:
        go_on.set()
        server.shutdown()


def test_what_cannot_be_compiled_is_refused_when_the_request_is_made(make_sync_engine: EngineFactory) -> None:
    engine, _ = make_sync_engine()
    with pytest.raises(ValueError, match="regex cannot be used"):
        add(engine, "bad", StructuredOutput(kind="regex", source="["))
    assert not engine.has_work
