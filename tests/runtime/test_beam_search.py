"""Beam search against trying everything, and on an engine."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.fakes import EngineFactory
from xllm_compile.runtime.beam_search import MAX_BEAM_WIDTH, BeamSearch, BeamSearchParams, score
from xllm_compile.runtime.llm import LLMBase
from xllm_compile.runtime.outputs import Logprob

EOS = 0
VOCABULARY = range(4)


class Decoder:
    eos_token_ids = frozenset({EOS})

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids))


def toy_model(seed):
    """Log-probabilities of the next token after any tokens."""

    def next_tokens(tokens):
        weights = [1 + hash((seed, tokens, token)) % 97 for token in VOCABULARY]
        total = sum(weights)
        ranked = sorted(VOCABULARY, key=lambda token: -weights[token])
        return {
            token: Logprob(logprob=math.log(weights[token] / total), rank=rank, decoded_token=str(token))
            for rank, token in enumerate(ranked, start=1)
        }

    return next_tokens


def search(model, stop_early=True, **options):
    params = BeamSearchParams(**options)
    beams = BeamSearch(params=params, prompt=[], tokenizer=Decoder())
    for _ in range(params.max_tokens):
        steps = [model(beam.tokens) for beam in beams.running]
        beams.advance([dict(itertools.islice(step.items(), 2 * params.beam_width)) for step in steps])
        if not beams.running or (stop_early and beams.is_done):
            break
    return [(beam.tokens, round(beam.score(params.length_penalty), 9)) for beam in beams.best()]


def everything(model, max_tokens, length_penalty, n):
    """All continuations there are, by score."""
    found: list[tuple[tuple[int, ...], float]] = []
    open_ones: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    for _ in range(max_tokens):
        grown: list[tuple[tuple[int, ...], float]] = []
        for tokens, total in open_ones:
            for token, entry in model(tokens).items():
                longer = (*tokens, token), total + entry.logprob
                (found if token == EOS else grown).append(longer)
        open_ones = grown
    scored = [
        (tokens, round(score(total, len(tokens) - (tokens[-1] == EOS), length_penalty), 9))
        for tokens, total in (*found, *open_ones)
    ]
    return sorted(scored, key=lambda entry: -entry[1])[:n]


@given(seed=st.integers(0, 1000), length_penalty=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]), n=st.integers(1, 3))
@settings(max_examples=40)
def test_wide_enough_it_finds_the_best_there_are(seed, length_penalty, n):
    # Three tokens that go on, twice: nine beams hold everything.
    model = toy_model(seed)
    found = search(model, beam_width=9, max_tokens=3, n=n, length_penalty=length_penalty)
    assert [value for _, value in found] == [value for _, value in everything(model, 3, length_penalty, n)]


@given(
    seed=st.integers(0, 1000),
    length_penalty=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]),
    width=st.integers(1, 4),
    max_tokens=st.integers(1, 8),
)
@settings(max_examples=60)
def test_stopping_early_changes_nothing(seed, length_penalty, width, max_tokens):
    options = {"beam_width": width, "max_tokens": max_tokens, "n": width, "length_penalty": length_penalty}
    assert search(toy_model(seed), **options) == search(toy_model(seed), stop_early=False, **options)


def test_one_beam_is_greedy():
    model = toy_model(5)
    tokens: tuple[int, ...] = ()
    while len(tokens) < 6:
        tokens = (*tokens, next(token for token in model(tokens) if token != EOS))
    # So large a penalty that no early end can win.
    ((found, _),) = search(model, beam_width=1, max_tokens=6, length_penalty=10.0)
    assert found == tokens


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beam_width": MAX_BEAM_WIDTH + 1}, r"beam_width=11 must be in \[1, 10\]"),
        ({"n": 3}, r"n=3 must be in \[1, 2\], the width of the beam"),
        ({"length_penalty": 11.0}, "length_penalty=11.0 must be in"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
    ],
)
def test_bad_params(options, said):
    with pytest.raises(ValueError, match=said):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 4, **options})


def test_on_an_engine(make_engine: EngineFactory) -> None:
    """Against the same search on the runner's own logits."""
    engine, runner = make_engine(num_slots=8)
    prompts = [[40, 41, 42], [50]]
    params = BeamSearchParams(beam_width=3, n=2, max_tokens=5, ignore_eos=True, logprobs=1)
    outputs = LLMBase(engine).beam_search(prompts, params)
    for prompt, output in zip(prompts, outputs, strict=True):
        best: list[tuple[list[int], float]] = [(prompt, 0.0)]
        for _ in range(5):
            grown = []
            for tokens, total in best:
                logprobs = torch.log_softmax(runner.row(tokens), dim=0)
                grown += [
                    ([*tokens, token], total + logprobs[token].item()) for token in logprobs.topk(6).indices.tolist()
                ]
            best = sorted(grown, key=lambda entry: -entry[1])[:3]
        assert [completion.token_ids for completion in output.outputs] == [
            tokens[len(prompt) :] for tokens, _ in best[:2]
        ]
        assert output.outputs[0].cumulative_logprob == pytest.approx(best[0][1], abs=1e-4)
        assert output.outputs[0].text == engine.tokenizer.decode(output.outputs[0].token_ids)
        assert output.prompt_token_ids == prompt and output.finished


def test_a_prompt_without_room(make_engine: EngineFactory) -> None:
    engine, runner = make_engine(max_model_len=16)
    with pytest.raises(ValueError, match="12 tokens and max_tokens=5 exceed max_model_len=16"):
        LLMBase(engine).beam_search([[40], list(range(40, 52))], BeamSearchParams(beam_width=2, max_tokens=5))
    assert not runner.steps
