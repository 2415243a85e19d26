"""What a grammar forces rides in other tokens' steps: fewer steps, and nothing of any output changes."""

from collections.abc import Sequence
from typing import Any

import pytest

from tests.runtime.fakes import EngineFactory
from tests.runtime.sides import PROMPT, MakeSide, prefill, target_of, tokens_of
from tests.runtime.speculative.test_speculating_engine import SPECULATORS, FixedSeconds, MakeSpeculator
from tests.runtime.test_async_scheduling import mixed_requests, run, seen
from xllm_compile.benchmarks.random_schemas import random_schema
from xllm_compile.runtime.engine import Engine
from xllm_compile.runtime.sampling_params import RequestOutputKind, SamplingParams
from xllm_compile.runtime.speculative.adaptive import StepSeconds, num_forced_worth
from xllm_compile.runtime.speculative.speculator import MAX_FORCED_TOKENS, Speculator
from xllm_compile.runtime.structured_output import ReasoningText, StructuredOutput

# Long names make for long forced texts, cut into many tokens by a small vocabulary.
ORDER = StructuredOutput.json_schema(
    {
        "type": "object",
        "properties": {
            "quick brown fox": {"enum": ["jumps over", "jumps under"]},
            "story": {"type": "array", "items": {"const": "the end"}, "minItems": 2, "maxItems": 3},
            "number of lazy dogs": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["quick brown fox", "story", "number of lazy dogs"],
        "additionalProperties": False,
    }
)
TEXT = "0123456789 story END 0123456789"
THOUGHTS = ReasoningText(start="<think>", end="</think>")


def only_forced(step_seconds: StepSeconds | None = None) -> MakeSpeculator:
    return lambda _: Speculator(None, max_length=0, step_seconds=step_seconds or FixedSeconds())


def add(engine: Engine, name: str, structured: StructuredOutput | None, **options: Any) -> None:
    given: dict[str, Any] = {"max_tokens": 120}
    engine.add_request(name, [40 + len(name)], SamplingParams(structured=structured, **given | options))


def structured_requests(engine: Engine) -> None:
    """Every option that meets forced tokens."""
    add(engine, "greedy", ORDER, temperature=0)
    add(engine, "seeded", ORDER, temperature=1.0, seed=1, n=2)
    add(engine, "hot", ORDER, temperature=1.5, seed=2, top_p=0.8)
    add(engine, "logprobs", ORDER, temperature=1.0, seed=3, logprobs=2)
    add(engine, "greedy logprobs", ORDER, temperature=0, logprobs=0)
    add(engine, "penalties", ORDER, temperature=0, repetition_penalty=1.4, frequency_penalty=0.6, presence_penalty=0.7)
    add(engine, "seeded penalties", ORDER, temperature=0.8, seed=4, frequency_penalty=1.0, logit_bias={90: 9.0})
    add(engine, "min tokens", StructuredOutput.choice([TEXT]), min_tokens=60, stop_token_ids=[50, 51], seed=5)
    add(engine, "stop string", ORDER, temperature=0, stop=["of la"])
    add(engine, "cut short", StructuredOutput.choice([TEXT]), temperature=0, max_tokens=7)
    add(engine, "reasoning", StructuredOutput.choice([TEXT, "no"], THOUGHTS), temperature=1.0, seed=6, max_tokens=40)
    for seed in range(4):
        schema = StructuredOutput.json_schema(random_schema(seed))
        add(engine, f"random schema {seed}", schema, temperature=seed % 2, seed=seed)
    add(engine, "free", None, temperature=1.0, seed=7, max_tokens=30)


@pytest.mark.parametrize(
    ("with_proposer", "total_tokens"),
    [(None, 4096), (None, 256), ("suffix", 256), ("cheap", 4096), ("costly", 400), ("draft model", 400)],
)
def test_outputs_are_those_of_a_step_for_each_token(
    make_engine: EngineFactory, with_proposer: str | None, total_tokens: int
) -> None:
    make_speculator = SPECULATORS[with_proposer] if with_proposer else only_forced()
    results, num_forced = [], []
    for speculate in (None, make_speculator):
        # The smaller caches are too small for all: some are preempted and computed again.
        engine, _ = make_engine(
            max_model_len=160, total_tokens=total_tokens, max_num_batched_tokens=24, make_speculator=speculate
        )
        structured_requests(engine)
        mixed_requests(engine)
        results.append(seen(run(engine)))
        stats = engine.stats()
        assert stats.kv_tokens_used == stats.num_running == stats.num_waiting == 0
        num_forced.append(stats.num_forced_tokens)
        engine.close()
    assert results[0] == results[1]
    assert num_forced[0] == 0 < num_forced[1]


@pytest.mark.parametrize("make_speculator", [only_forced(), SPECULATORS["suffix"], SPECULATORS["costly"]])
@pytest.mark.parametrize("params", [{"temperature": 0}, {"temperature": 1.0}, {"seed": 3}, {"logprobs": 1}])
def test_steps_are_saved_and_counted(
    make_engine: EngineFactory, make_speculator: MakeSpeculator, params: dict[str, Any]
) -> None:
    engine, runner = make_engine(make_speculator=make_speculator)
    add(engine, "one", StructuredOutput.choice([TEXT]), max_tokens=60, **params)
    output = run(engine)["one"]
    (completion,) = output.outputs
    assert completion.text == TEXT and completion.finish_reason == "stop"
    num_steps = len(runner.steps) - make_engine.is_async  # The end is noticed with one more step under way.
    num_tokens = len(completion.token_ids)
    assert output.metrics.num_forced_tokens == engine.stats().num_forced_tokens == num_tokens - num_steps
    # One for the prompt, whose token is forced as well, and one for every MAX_FORCED_TOKENS and the one after them.
    assert num_steps <= 2 + num_tokens // MAX_FORCED_TOKENS
    # They are no guesses.
    assert output.metrics.num_draft_tokens == output.metrics.num_accepted_tokens == 0
    num_rows = [len(step.logits_at) for step in runner.steps]
    assert (max(num_rows) > 1) == ("logprobs" in params)


def test_no_logits_are_computed_of_what_is_forced_but_for_logprobs(make_sync_engine: EngineFactory) -> None:
    engine, runner = make_sync_engine(make_speculator=only_forced())
    add(engine, "one", StructuredOutput.choice([2 * TEXT]), temperature=0)
    run(engine)
    assert max(len(step.token_ids) for step in runner.steps) == 1 + MAX_FORCED_TOKENS
    assert [len(step.logits_at) for step in runner.steps] == [1] * len(runner.steps)


def test_other_requests_have_nothing_to_do_with_it(make_sync_engine: EngineFactory) -> None:
    engine, _ = make_sync_engine(make_speculator=only_forced())
    add(engine, "free", None, temperature=0, max_tokens=9, ignore_eos=True)
    request = engine.make_request("another", [50], SamplingParams())
    assert request.sequences[0].speculation is None
    assert run(engine)["free"].metrics.num_forced_tokens == 0
    assert engine.stats().speculation is None


def test_a_stream_gets_each_token_once(make_engine: EngineFactory) -> None:
    engine, _ = make_engine(make_speculator=only_forced())
    add(engine, "one", StructuredOutput.choice([TEXT]), temperature=0, output_kind=RequestOutputKind.DELTA)
    streamed = [output.outputs[0] for output in iterate(engine)]
    assert "".join(part.text for part in streamed) == TEXT
    assert max(len(part.token_ids) for part in streamed) > 1


def iterate(engine: Engine) -> Sequence[Any]:
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


def test_an_abort_gives_the_room_back(make_engine: EngineFactory) -> None:
    engine, _ = make_engine(make_speculator=only_forced(), max_model_len=128)
    for name in ("leaving", "staying"):
        add(engine, name, ORDER, temperature=0)
    for _ in range(4):
        engine.step()
    engine.abort("leaving")
    final = run(engine)
    assert final["leaving"].outputs[0].finish_reason == "abort"
    assert final["staying"].outputs[0].finish_reason == "stop"
    assert engine.stats().kv_tokens_used == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_that_is_handed_over_goes_on_with_the_same_tokens(make_side: MakeSide, temperature: float) -> None:
    options: dict[str, Any] = {"structured": ORDER, "temperature": temperature, "seed": 9, "max_tokens": 60}
    alone = make_side(max_model_len=128)
    alone.engine.add_request("alone", PROMPT, SamplingParams(output_kind=RequestOutputKind.DELTA, **options))
    expected = tokens_of(alone.run("alone"))
    p, d = (make_side(max_model_len=128, make_speculator=only_forced()) for _ in "pd")
    prefill(p, target_of(d.reserve("r", PROMPT)), **options)
    first, *_ = p.run("prefill")
    p.rest()
    tokens = tokens_of([first])
    assert tokens == expected[: len(tokens)]
    before = d.engine.stats().num_steps
    assert d.decode("r", tokens, len(PROMPT), ignore_eos=False, **options) == expected[len(tokens) :]
    assert d.engine.stats().num_steps - before < len(expected) - len(tokens)
    d.rest()


def test_a_step_takes_in_what_makes_it_bring_most_tokens_a_second() -> None:
    def worth(num_forced: int, *seconds: float) -> int:
        return num_forced_worth(num_forced, num_rows=8, num_tokens=8, step_seconds=lambda rows: seconds[rows - 8])

    # Rows are free up to ten, and with the eleventh a larger graph runs.
    steps = (1.0, 1.0, 1.0, 1.5, 1.5, 1.5, 1.5, 1.5)
    assert [worth(count, *steps) for count in range(8)] == [0, 1, 2, 2, 2, 2, 2, 2]
    assert worth(8, *steps, 1.5) == 8
    # A row that costs what it brings is no gain.
    assert worth(2, 1.0, 9 / 8, 10 / 8) == 0


def test_who_rides_along_changes_from_step_to_step(make_sync_engine: EngineFactory) -> None:
    class TwoAreFree(FixedSeconds):
        def __call__(self, num_rows: int) -> float:
            return 1.0 if num_rows <= 6 else 100.0

    engine, runner = make_sync_engine(make_speculator=only_forced(TwoAreFree()))
    for name in "abcd":
        add(engine, name, StructuredOutput.choice([TEXT]), temperature=0)
    final = run(engine)
    assert max(len(step.token_ids) for step in runner.steps) == 6
    # None is done much before the others.
    num_steps = [len(runner.steps) - sum(output.metrics.graph_steps.values()) for output in final.values()]
    assert max(num_steps) <= 4, num_steps
    forced = [output.metrics.num_forced_tokens for output in final.values()]
    assert min(forced) >= max(forced) - 4, forced
