import io
import sys

import pytest

from tests.runtime.fakes import EngineFactory
from xllm_compile.runtime.engine_config import EngineConfig
from xllm_compile.runtime.llm import LLMBase, Prompt, Prompts
from xllm_compile.runtime.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, ignore_eos=True, max_tokens=5)


def test_every_form_of_prompt(make_engine: EngineFactory) -> None:
    engine, runner = make_engine()
    llm = LLMBase(engine)
    ids = engine.tokenizer.encode("the fox")
    expected = runner.greedy(ids, 5)
    forms: tuple[Prompts, ...] = (
        "the fox",
        ids,
        tuple(ids),
        {"prompt_token_ids": ids},
        ["the fox"],
        [ids],
        [{"prompt_token_ids": ids}],
    )
    for form in forms:
        (output,) = llm.generate(form, GREEDY)
        assert output.finished and output.prompt_token_ids == ids
        assert output.outputs[0].token_ids == expected
    assert llm.generate([], GREEDY) == []
    both: list[Prompt] = ["the fox", ids]
    mixed = llm.generate(both, GREEDY)
    assert [output.prompt for output in mixed] == ["the fox", None]


def test_results_are_in_the_order_of_the_prompts_beyond_the_queue_bound(make_engine: EngineFactory) -> None:
    engine, runner = make_engine(config=EngineConfig(max_waiting=3), total_tokens=70)
    prompts = [[50 + index] * (1 + index % 7) for index in range(25)]
    params = [SamplingParams(temperature=0, ignore_eos=True, max_tokens=1 + index % 9) for index in range(25)]
    outputs = LLMBase(engine).generate(prompts, params)
    for prompt, param, output in zip(prompts, params, outputs, strict=True):
        assert param.max_tokens is not None
        assert output.outputs[0].token_ids == runner.greedy(prompt, param.max_tokens)


def test_default_params_are_the_models(make_engine: EngineFactory) -> None:
    engine, _ = make_engine()
    (output,) = LLMBase(engine).generate("the fox")
    assert 1 <= len(output.outputs[0].token_ids) <= SamplingParams().max_tokens  # type: ignore[operator]
    assert engine.tokenizer.default_sampling_params().temperature == 0.6


def test_chat_renders_the_template_and_encodes_it_once(make_engine: EngineFactory) -> None:
    engine, runner = make_engine()
    llm = LLMBase(engine)
    messages = [{"role": "user", "content": "hi"}]
    text = engine.tokenizer.apply_chat_template(messages)
    ids = engine.tokenizer.encode(text, add_special_tokens=False)
    (one,) = llm.chat(messages, GREEDY)
    assert (one.prompt, one.prompt_token_ids) == (text, ids)
    assert one.outputs[0].token_ids == runner.greedy(ids, 5)
    assert [output.prompt_token_ids for output in llm.chat([messages, messages], GREEDY)] == [ids, ids]
    (other,) = llm.chat(messages, GREEDY, chat_template="{{ word }}", chat_template_kwargs={"word": "fox"})
    assert other.prompt == "fox"
    with pytest.raises(ValueError, match="messages is empty"):
        llm.chat([], GREEDY)


def test_bad_input_computes_nothing(make_engine: EngineFactory) -> None:
    engine, runner = make_engine()
    llm = LLMBase(engine)
    with pytest.raises(ValueError, match="2 sampling_params for 1 prompts"):
        llm.generate("a", [GREEDY, GREEDY])
    with pytest.raises(ValueError, match="0 tokens"):
        llm.generate(["a", ""], GREEDY)
    with pytest.raises(ValueError, match=r"keys \['text'\]"):
        llm.generate([{"text": "a"}], GREEDY)  # type: ignore[arg-type]
    assert not engine.has_work and not runner.steps


def test_an_interrupted_call_leaves_nothing_for_the_next(make_engine: EngineFactory) -> None:
    engine, runner = make_engine()
    llm = LLMBase(engine)
    runner.fails = True
    with pytest.raises(RuntimeError, match="the device is gone"):
        llm.generate([[50], [51], [52]], GREEDY)
    runner.fails = False
    (output,) = llm.generate([[60]], GREEDY)
    assert output.outputs[0].token_ids == runner.greedy([60], 5)
    assert engine.stats().kv_tokens_used == 0


def test_progress_is_shown_on_a_terminal_only(make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    llm = LLMBase(make_engine()[0])
    for stream, use_tqdm, is_shown in (
        (Terminal(), True, True),
        (Terminal(), False, False),
        (io.StringIO(), True, False),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        llm.generate([[50], [51]], GREEDY, use_tqdm=use_tqdm)
        assert ("2/2" in stream.getvalue()) == is_shown
