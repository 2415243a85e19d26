"""Speculation in the engine changes how many steps an output takes, and nothing of it."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch import Tensor

from tests.runtime.fakes import EngineFactory, HistoryRunner, make_kv_cache
from tests.runtime.test_async_scheduling import mixed_requests, run, seen
from xllm_compile.runtime.engine import Engine
from xllm_compile.runtime.engine_config import EngineConfig
from xllm_compile.runtime.sampling_params import RequestOutputKind, SamplingParams
from xllm_compile.runtime.speculative.adaptive import StepSeconds
from xllm_compile.runtime.speculative.draft_model import DraftModel
from xllm_compile.runtime.speculative.proposer import Draft, Proposer, Speculation
from xllm_compile.runtime.speculative.speculator import Speculator
from xllm_compile.runtime.speculative.suffix import SuffixProposer
from xllm_compile.runtime.structured_output import StructuredOutput
from xllm_compile.runtime.tokenizer import Tokenizer

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
MAX_LENGTH = 4
MakeSpeculator = Callable[[HistoryRunner], Speculator]


class Prophet:
    """Knows the greedy text, and lies in every fifth token of it."""

    def __init__(self, runner: HistoryRunner, *, is_costly: bool) -> None:
        self.is_costly = is_costly
        self.alive: set[Speculation] = set()
        self._runner = runner

    def observe(self, sequence: Speculation) -> int | None:
        self.alive.add(sequence)
        return 0

    def propose(self, sequences: Sequence[Speculation], lengths: Sequence[int]) -> list[Draft]:
        return [self._draft(sequence.token_ids, length) for sequence, length in zip(sequences, lengths, strict=True)]

    def forget(self, sequence: Speculation) -> None:
        self.alive.discard(sequence)

    def _draft(self, text: list[int], length: int) -> Draft:
        tokens = self._runner.greedy(text, length)
        return Draft([token ^ ((len(text) + at) % 5 == 0) for at, token in enumerate(tokens)])


class FixedSeconds(StepSeconds):
    """Rows are nearly free, whatever they cost in the fake: drafts always pay."""

    def __init__(self) -> None:
        super().__init__(lambda rows: 1 + 0.001 * rows)

    def observe(self, num_rows: int, seconds: float) -> None:
        pass

    def is_stale(self, num_rows: int) -> bool:
        return False


def speculator(proposer: Proposer) -> Speculator:
    return Speculator(proposer, max_length=MAX_LENGTH, step_seconds=FixedSeconds(), clock=lambda: 0.0)


def draft_model(runner: HistoryRunner, *, max_model_len: int = 64, total_tokens: int = 512) -> Speculator:
    """The model drafts for itself, on a cache of its own."""
    kv_cache = make_kv_cache(max_model_len=max_model_len, total_tokens=total_tokens)
    return speculator(DraftModel(HistoryRunner(kv_cache, max_num_batched_tokens=9), kv_cache))


SPECULATORS: dict[str, MakeSpeculator] = {
    "cheap": lambda runner: speculator(Prophet(runner, is_costly=False)),
    "costly": lambda runner: speculator(Prophet(runner, is_costly=True)),
    "suffix": lambda runner: speculator(SuffixProposer(max_shared_tokens=200)),
    "draft model": draft_model,
    "none": lambda _: Speculator(None, max_length=0, step_seconds=FixedSeconds()),
    "short draft model": lambda runner: draft_model(runner, max_model_len=24, total_tokens=30),
}


@pytest.fixture(params=SPECULATORS)
def make_speculator(request: pytest.FixtureRequest) -> MakeSpeculator:
    return SPECULATORS[request.param]


def add_structured(engine: Engine) -> None:
    structured = StructuredOutput.choice(["the quick brown fox", "no"])
    engine.add_request("structured", [77], SamplingParams(structured=structured, seed=1, max_tokens=30))
    engine.add_request("greedy structured", [78], SamplingParams(structured=structured, temperature=0, max_tokens=30))


@pytest.mark.parametrize("total_tokens", [64, 90, 512])
def test_every_output_is_what_it_is_without(
    make_engine: EngineFactory, make_speculator: MakeSpeculator, total_tokens: int
) -> None:
    results = []
    for speculate in (None, make_speculator):
        engine, _ = make_engine(total_tokens=total_tokens, max_num_batched_tokens=17, make_speculator=speculate)
        mixed_requests(engine)
        add_structured(engine)
        results.append(seen(run(engine)))
        stats = engine.stats()
        assert stats.kv_tokens_used == stats.num_running == stats.num_waiting == 0
        engine.close()
    assert results[0] == results[1]


def test_accepted_tokens_save_steps_and_are_counted(make_engine: EngineFactory) -> None:
    engine, runner = make_engine(make_speculator=SPECULATORS["cheap"])
    engine.add_request("one", [50, 51], SamplingParams(max_tokens=40, **GREEDY))
    output = run(engine)["one"]
    assert output.outputs[0].token_ids == runner.greedy([50, 51], 40)
    # One for the prompt; then four drafted tokens of which each fifth is wrong, and the model's own.
    assert len(runner.steps) <= 20
    stats = engine.stats().speculation
    assert stats is not None
    assert output.metrics.num_draft_tokens == stats.num_draft_tokens > 20
    assert output.metrics.num_accepted_tokens == stats.num_accepted_tokens == 40 - len(runner.steps)
    assert stats.drafted_by_position == sorted(stats.drafted_by_position, reverse=True)
    assert all(map(int.__le__, stats.accepted_by_position, stats.drafted_by_position))


class Babbler:
    """Always drafts the same token."""

    def __init__(self, token_id: int, *, is_costly: bool) -> None:
        self.is_costly = is_costly
        self._token_id = token_id

    def observe(self, sequence: Speculation) -> int | None:
        return 0

    def propose(self, sequences: Sequence[Speculation], lengths: Sequence[int]) -> list[Draft]:
        return [Draft([self._token_id] * length) for length in lengths]

    def forget(self, sequence: Speculation) -> None:
        pass


@pytest.mark.parametrize("is_costly", [False, True])
def test_what_a_grammar_refuses_is_not_verified(
    make_engine: EngineFactory, tokenizer: Tokenizer, is_costly: bool
) -> None:
    (wrong,) = tokenizer.encode("z")
    engine, _ = make_engine(make_speculator=lambda _: speculator(Babbler(wrong, is_costly=is_costly)))
    params = SamplingParams(structured=StructuredOutput(kind="regex", source="[ab]{30}"), temperature=0, max_tokens=40)
    engine.add_request("one", [50], params)
    assert len(run(engine)["one"].outputs[0].text) == 30
    stats = engine.stats().speculation
    assert stats is not None and stats.num_draft_tokens == 0


def test_nothing_is_generated_or_streamed_beyond_an_end(make_engine: EngineFactory) -> None:
    engine, runner = make_engine(make_speculator=SPECULATORS["cheap"])
    tokens = runner.greedy([60], 12)
    cases = {
        "length": SamplingParams(max_tokens=7, output_kind=RequestOutputKind.DELTA, **GREEDY),
        "stop": SamplingParams(
            max_tokens=30, stop_token_ids=[tokens[8]], output_kind=RequestOutputKind.DELTA, **GREEDY
        ),
        "model": SamplingParams(max_tokens=None, output_kind=RequestOutputKind.DELTA, **GREEDY),
    }
    for name, params in cases.items():
        engine.add_request(name, [60], params)
    streamed: dict[str, list[int]] = {name: [] for name in cases}
    while engine.has_work:
        for output in engine.step():
            streamed[output.request_id] += output.outputs[0].token_ids
    assert streamed["length"] == tokens[:7]
    assert streamed["stop"] == tokens[: tokens.index(tokens[8]) + 1]
    assert streamed["model"] == runner.greedy([60], 63)


def test_aborts_and_failures_leave_nothing_behind(make_engine: EngineFactory) -> None:
    prophets: list[Prophet] = []

    def make(runner: HistoryRunner) -> Speculator:
        prophets.append(Prophet(runner, is_costly=False))
        return speculator(prophets[0])

    engine, runner = make_engine(make_speculator=make, poison=17)
    runner.script([61], [5, 6, 7, 17, 9, 9])
    for name, prompt in (("failing", [61]), ("leaving", [62]), ("staying", [63])):
        engine.add_request(name, prompt, SamplingParams(max_tokens=30, **GREEDY))
    final = {output.request_id: output for _ in range(3) for output in engine.step()}
    engine.abort("leaving")
    final |= run(engine)
    assert final["failing"].outputs[0].token_ids == [5, 6, 7, 17]
    assert "NaN" in str(final["failing"].outputs[0].stop_reason)
    assert final["leaving"].outputs[0].finish_reason == "abort"
    assert final["staying"].outputs[0].token_ids == runner.greedy([63], 30)
    # What ended last is forgotten with the next step.
    engine.add_request("last", [64], SamplingParams(max_tokens=1, **GREEDY))
    run(engine)
    assert len(prophets[0].alive) <= 1
    assert engine.stats().kv_tokens_used == 0


def test_drafts_take_only_what_a_step_has_left(make_engine: EngineFactory) -> None:
    # The fake refuses steps above the limit, and the KV cache sequences that outgrow it.
    engine, runner = make_engine(
        max_model_len=32,
        total_tokens=60,
        max_num_batched_tokens=6,
        max_num_seqs=4,
        make_speculator=SPECULATORS["cheap"],
    )
    for index in range(4):
        engine.add_request(str(index), [70 + index] * 9, SamplingParams(max_tokens=12, **GREEDY))
    final = run(engine)
    for index in range(4):
        assert final[str(index)].outputs[0].token_ids == runner.greedy([70 + index] * 9, 12)


def test_a_model_that_drafts_for_itself_is_always_right(make_engine: EngineFactory) -> None:
    for params in (GREEDY, {"temperature": 1.0, "top_k": 5, "ignore_eos": True}):
        engine, runner = make_engine(make_speculator=draft_model)
        for name, prompt in (("a", [50]), ("b", list(range(80, 100)))):
            engine.add_request(name, prompt, SamplingParams(max_tokens=26, **params))
        run(engine)
        stats = engine.stats().speculation
        assert stats is not None and stats.num_drafts > 0
        assert stats.num_accepted_tokens == stats.num_draft_tokens
        assert len(runner.steps) < 16


class Blurred(HistoryRunner):
    """The model, less sure of itself: drafts drawn from it are now accepted and now refused."""

    def row(self, history: Sequence[int]) -> Tensor:
        return 0.1 * super().row(history)


def test_requests_without_a_seed_keep_their_distribution(make_engine: EngineFactory) -> None:
    """Pearson's test of three tokens of 1,500 completions, of which the last two are drafted."""

    def make(runner: HistoryRunner) -> Speculator:
        kv_cache = make_kv_cache()
        return speculator(DraftModel(Blurred(kv_cache), kv_cache))

    engine, runner = make_engine(make_speculator=make, config=EngineConfig(max_waiting=2000))
    top_k, prompt = 3, [50, 51]
    params = SamplingParams(temperature=1.0, top_k=top_k, n=125, max_tokens=4, ignore_eos=True)
    for index in range(12):
        engine.add_request(str(index), prompt, params)
    found = Counter(tuple(completion.token_ids[:3]) for output in run(engine).values() for completion in output.outputs)
    total = sum(found.values())
    expected: dict[tuple[int, ...], float] = {(): float(total)}
    for _ in range(3):
        longer: dict[tuple[int, ...], float] = {}
        for before, count in expected.items():
            best = runner.row(prompt + list(before)).topk(top_k)
            for token, chance in zip(best.indices.tolist(), best.values.softmax(0).tolist(), strict=True):
                longer[(*before, token)] = count * chance
        expected = longer
    assert set(found) <= set(expected)
    # Rare ones together: the test's statistic needs some of each.
    pairs = [(found[tokens], count) for tokens, count in expected.items() if count >= 5]
    pairs.append((total - sum(seen for seen, _ in pairs), total - sum(count for _, count in pairs)))
    # At most 26 degrees of freedom: a right sampler is above it once in ten million.
    assert sum((seen - count) ** 2 / count for seen, count in pairs if count > 1e-6) < 84
    stats = engine.stats().speculation
    assert stats is not None and 0.2 < stats.num_accepted_tokens / stats.num_draft_tokens < 0.98
