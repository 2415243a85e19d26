"""Verification is lossless: greedy tokens are plain greedy's, samples have the request's own distribution."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xllm_compile.runtime.candidates import Kept
from xllm_compile.runtime.sampler import SampledToken, SamplingFailure, SamplingState, sample
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.runtime.speculative.proposer import NO_DRAFT, Draft
from xllm_compile.runtime.speculative.verify import verify

VOCAB_SIZE = 6
# Of Pearson's statistic with 5 degrees of freedom; a right sampler is above it once in a million.
CHI_SQUARE_LIMIT = 35.9


def model(history: list[int]) -> Tensor:
    """Logits [V] that depend on all of the history."""
    rng = np.random.default_rng([7, *history])
    return torch.from_numpy(rng.normal(0, 1.5, VOCAB_SIZE).astype(np.float32))


def rows_for(history: list[int], draft: Draft) -> Tensor:
    return torch.stack([model(history + draft.token_ids[:end]) for end in range(len(draft.token_ids) + 1)])


def verify_one(logits: Tensor, state: SamplingState, draft: Draft) -> list[int]:
    (verified,) = verify(logits, [state], [draft])
    return [result.token_id for result in verified if isinstance(result, SampledToken)]


def plain(history: list[int], params: SamplingParams, count: int, stop_ids: tuple[int, ...] = ()) -> list[SampledToken]:
    """What sampling one token after the other gives."""
    state = SamplingState(params, history, stop_ids=stop_ids)
    text, found = list(history), []
    for _ in range(count):
        (result,) = sample(model(text)[None], [state])
        assert isinstance(result, SampledToken)
        state.record(result.token_id)
        text.append(result.token_id)
        found.append(result)
    return found


@settings(max_examples=200)
@given(
    history=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=4),
    drafts=st.lists(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=4), min_size=8, max_size=8),
    help_from=st.integers(0, 8),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    penalty=st.sampled_from([0.0, 1.0]),
    repetition=st.sampled_from([1.0, 1.3]),
    min_tokens=st.sampled_from([0, 3]),
    logprobs=st.sampled_from([None, 2]),
)
def test_drafts_that_were_not_drawn_change_nothing(
    history, drafts, help_from, temperature, penalty, repetition, min_tokens, logprobs
) -> None:
    params = SamplingParams(
        temperature=temperature,
        frequency_penalty=penalty,
        repetition_penalty=repetition,
        min_tokens=min_tokens,
        logprobs=logprobs,
        seed=11,
        top_p=0.9,
    )
    expected = plain(history, params, 80, stop_ids=(2,))
    state = SamplingState(params, history, stop_ids=(2,))
    found: list[SampledToken | SamplingFailure] = []
    for draft in drafts:
        # Some drafts are right for a while.
        right = [token.token_id for token in expected[len(found) : len(found) + help_from % 5]]
        text = history + [token.token_id for token in expected[: len(found)]]
        guess = Draft(right + draft)
        (verified,) = verify(rows_for(text, guess), [state], [guess])
        assert 1 <= len(verified) <= 1 + len(guess.token_ids)
        found += verified
    assert found == expected[: len(found)]


def test_several_sequences_take_their_own_rows() -> None:
    histories = [[1], [2, 3], [4]]
    expected = [[token.token_id for token in plain(history, SamplingParams(temperature=0), 4)] for history in histories]
    drafts = [Draft(expected[0][:3]), NO_DRAFT, Draft([expected[2][0], (expected[2][1] + 1) % VOCAB_SIZE])]
    logits = torch.cat([rows_for(history, draft) for history, draft in zip(histories, drafts, strict=True)])
    states = [SamplingState(SamplingParams(temperature=0), history) for history in histories]
    verified = verify(logits, states, drafts)
    tokens = [[result.token_id for result in results if isinstance(result, SampledToken)] for results in verified]
    assert tokens == [expected[0], expected[1][:1], expected[2][:2]]
    assert [state.num_output_tokens for state in states] == [4, 1, 2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_of_nan_fails_the_sequence_after_what_was_accepted(temperature: float) -> None:
    draft = Draft([token.token_id for token in plain([1], SamplingParams(temperature=temperature, seed=1), 3)])
    logits = rows_for([1], draft)
    logits[2] = torch.nan
    (verified,) = verify(logits, [SamplingState(SamplingParams(temperature=temperature, seed=1), [1])], [draft])
    assert [isinstance(result, SamplingFailure) for result in verified] == [False, False, True]


def kept(weights: list[float]) -> Kept:
    return Kept(torch.tensor(weights), None)


# The last draws only what the model hardly ever does, and never one of its favourites.
SOURCES = {
    "uniform": [1.0] * VOCAB_SIZE,
    "one token": [0.0, 0.0, 1.0, 0.0, 0.0, 0.0],
    "two tokens": [0.0, 0.5, 0.0, 0.0, 0.5, 0.0],
    "skewed": [0.9, 0.02, 0.02, 0.02, 0.02, 0.02],
    "the model's own": [],
    "the model upside down": [],
}


@pytest.mark.parametrize(
    ("source", "options"),
    [
        *((source, {}) for source in SOURCES),
        ("uniform", {"top_k": 3}),
        ("the model upside down", {"top_p": 0.8, "temperature": 0.7}),
        ("two tokens", {"presence_penalty": 1.0, "min_p": 0.05}),
    ],
)
def test_drawn_drafts_leave_the_distribution_as_it_is(source: str, options: dict) -> None:
    """Pearson's test of the first three tokens, each with the right ones before it, over 3,000 drafts of two."""
    params = SamplingParams(**options)
    rng = np.random.default_rng(3)
    torch.manual_seed(0)

    def draft_from(history: list[int]) -> Kept:
        if SOURCES[source]:
            return kept(SOURCES[source])
        logits = model(history)
        return Kept((logits if source == "the model's own" else -logits).softmax(0), None)

    history = [1, 4]
    counts: dict[tuple[int, ...], Counter[int]] = {}
    num_accepted = 0
    state = _Unseeded(params, history, rng)
    for _ in range(3_000):
        state.reset()
        sources, tokens = [], list[int]()
        for _ in range(2):
            sources.append(draft_from(history + tokens))
            weights = sources[-1].weights.double().numpy()
            tokens.append(int(rng.choice(VOCAB_SIZE, p=weights / weights.sum())))
        draft = Draft(tokens, sources)
        found = verify_one(rows_for(history, draft), state, draft)
        num_accepted += len(found) - 1
        for position, token in enumerate(found):
            counts.setdefault(tuple(found[:position]), Counter())[token] += 1
    for before, observed in counts.items():
        total = sum(observed.values())
        if total < 200:
            continue
        expected = _distribution(history, list(before), params) * total
        assert all(expected[token] > 0 for token in observed), "a token that the request cannot draw"
        often = expected >= 5
        statistic = sum((observed[int(at)] - expected[at]) ** 2 / expected[at] for at in np.flatnonzero(often))
        assert statistic < CHI_SQUARE_LIMIT, (before, observed, expected)
    if source == "the model's own" and not options:
        assert num_accepted == 6_000


class _Unseeded(SamplingState):
    """Random numbers from a generator of the test, for repeatable statistics of a request without a seed."""

    def __init__(self, params: SamplingParams, history: list[int], rng: np.random.Generator) -> None:
        super().__init__(params, history)
        self._rng = rng

    def reset(self) -> None:
        self.output_counts = {}
        self.num_output_tokens = 0

    def uniform(self) -> float:
        return float(self._rng.random())


def _distribution(history: list[int], before: list[int], params: SamplingParams) -> np.ndarray:
    """What the request draws from, in plain numpy."""
    logits = model(history + before).double().numpy()
    for token in set(before):
        logits[token] -= params.presence_penalty
    weights = np.exp((logits - logits.max()) / params.temperature)
    order = np.argsort(-weights)
    if params.top_k:
        weights[order[params.top_k :]] = 0
    weights /= weights.sum()
    weights[weights < params.min_p * weights.max()] = 0
    weights /= weights.sum()
    if params.top_p < 1:
        size = int(np.searchsorted(np.cumsum(weights[order]), params.top_p)) + 1
        weights[order[size:]] = 0
    return weights / weights.sum()
