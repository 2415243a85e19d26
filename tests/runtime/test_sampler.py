import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xllm_compile.runtime.candidates import keep_candidates
from xllm_compile.runtime.sampler import SampledToken, SamplingFailure, SamplingState, sample, token_logprobs
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.runtime.token_matcher import TokenMask

VOCAB_SIZE = 151_936


def make_logits(rows: int, vocab_size: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 2


def sample_ids(logits: Tensor, states: list[SamplingState]) -> list[int]:
    results = sample(logits, states)
    assert all(isinstance(result, SampledToken) for result in results)
    return [result.token_id for result in results if isinstance(result, SampledToken)]


def state(prompt: tuple[int, ...] = (), *, stop_ids: tuple[int, ...] = (), index: int = 0, **params) -> SamplingState:
    return SamplingState(SamplingParams(**params), prompt, stop_ids=stop_ids, index=index)


def kept_by_sorting(row: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The filters written down plainly, in float64 over the sorted vocabulary."""
    probabilities = (row.double() / temperature).softmax(0)
    order = sorted(range(len(row)), key=lambda token: -probabilities[token].item())
    kept = [token for token in order if probabilities[token] >= min_p * probabilities[order[0]]]
    kept = kept[:top_k] if top_k > 0 else kept
    mass = sum(probabilities[token].item() for token in kept)
    nucleus, reached = [], 0.0
    for token in kept:
        if top_p < 1 and reached >= top_p * mass:
            break
        nucleus.append(token)
        reached += probabilities[token].item()
    return set(nucleus)


def test_greedy_takes_the_largest_logit_with_and_without_edits() -> None:
    logits = make_logits(5)
    expected = logits.argmax(1).tolist()
    assert sample_ids(logits, [state(temperature=0) for _ in range(5)]) == expected
    mixed = [state(temperature=0, logprobs=1), *(state(temperature=0) for _ in range(4))]
    assert sample_ids(logits, mixed) == expected


def test_logits_are_not_changed() -> None:
    logits = make_logits(1)
    before = logits.clone()
    sample(logits, [state((1, 2), repetition_penalty=2.0, logit_bias={3: 5.0}, min_tokens=2, max_tokens=4)])
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"top_k": 8, "top_p": 0.8, "min_p": 0.02, "temperature": 1.3},
        {"logit_bias": {4: 3.0}},
    ],
)
def test_samples_follow_the_distribution(params: dict) -> None:
    row = make_logits(1, vocab_size=24, seed=3)[0]
    biased = row.clone()
    for token, bias in params.get("logit_bias", {}).items():
        biased[token] += bias
    filters = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | {
        name: value for name, value in params.items() if name != "logit_bias"
    }
    kept = kept_by_sorting(biased, **filters)
    expected = (biased.double() / filters["temperature"]).softmax(0)
    expected[[token for token in range(24) if token not in kept]] = 0
    expected /= expected.sum()
    num_draws = 6000
    one = state(seed=11, **params)
    counts = np.bincount([sample_ids(row[None], [one])[0] for _ in range(num_draws)], minlength=24)
    assert {token for token, count in enumerate(counts) if count} <= kept
    wanted = expected.numpy() * num_draws
    usual = wanted >= 5
    statistic = ((counts[usual] - wanted[usual]) ** 2 / wanted[usual]).sum()
    # Mean df and deviation sqrt(2 df); five deviations are passed once in millions, and the seed is fixed anyway.
    freedom = max(1, usual.sum() - 1)
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


@settings(max_examples=150)
@given(
    vocab_size=st.sampled_from([1, 3, 50, 257, 700, 5000]),
    scale=st.sampled_from([0.0, 0.01, 1.0, 8.0]),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 7, 300, 6000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.31, 1e-6]),
    min_p=st.sampled_from([0.0, 0.001, 0.2, 1.0]),
    seed=st.integers(0, 5),
)
def test_candidates_are_what_sorting_the_vocabulary_gives(
    vocab_size: int, scale: float, temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    row = make_logits(1, vocab_size, seed)[0] * scale
    kept = keep_candidates(row, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    ids = list(range(vocab_size)) if kept.token_ids is None else kept.token_ids.tolist()
    assert len(set(ids)) == len(ids) == len(kept.weights)
    expected = kept_by_sorting(row, temperature, top_k, top_p, min_p)
    # Equal probabilities leave open which token is in, and rounding whether one at the very edge is.
    assert abs(len(ids) - len(expected)) <= (1 if scale else max(1, round(1e-4 * vocab_size)))
    if scale:
        assert len(set(ids) ^ expected) <= 1
    weights = (row[ids].double() / temperature).softmax(0)
    torch.testing.assert_close(kept.weights.double() / kept.weights.double().sum(), weights, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("scale", [0.001, 3.0])
def test_a_large_vocabulary_peaked_or_flat(scale: float) -> None:
    row = make_logits(1, VOCAB_SIZE)[0] * scale
    kept = keep_candidates(row, temperature=1.0, top_k=0, top_p=0.9, min_p=0.0)
    assert kept.token_ids is not None
    inside = row.double().softmax(0)[kept.token_ids]
    assert inside.sum() >= 0.9 - 1e-6 and inside[:-1].sum() < 0.9 + 1e-6


def test_penalties_follow_their_formulas() -> None:
    row = make_logits(1, vocab_size=10)[0]
    penalised = state((1, 2, 2), presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=1.7, seed=0)
    for token in (3, 3, 5, 2):
        penalised.record(token)
    expected = row.clone()
    for token in (1, 2, 3, 5):
        expected[token] = expected[token] / 1.7 if expected[token] > 0 else expected[token] * 1.7
    for token, count in ((3, 2), (5, 1), (2, 1)):
        expected[token] -= 0.5 + 0.25 * count
    torch.testing.assert_close(penalised.edited(row), expected)
    # Recorded after the first use: the set of seen tokens is kept up.
    penalised.record(7)
    expected[7] = (expected[7] / 1.7 if expected[7] > 0 else expected[7] * 1.7) - 0.75
    torch.testing.assert_close(penalised.edited(row), expected)


def test_logit_bias_is_added() -> None:
    logits = torch.zeros(1, 10)
    assert sample_ids(logits, [state(temperature=0, logit_bias={7: 2.0, 3: 1.0})]) == [7]
    assert sample_ids(logits, [state(temperature=0, logit_bias={0: -100.0, 9: 0.1})]) == [9]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stop_tokens_are_masked_until_min_tokens(temperature: float) -> None:
    logits = torch.zeros(1, 10)
    logits[0, 4] = 50.0
    # 999 is a stop token that only the tokenizer knows.
    one = state(temperature=temperature, stop_ids=(4, 999), min_tokens=2, seed=1)
    for _ in range(2):
        token = sample_ids(logits, [one])[0]
        assert token != 4
        one.record(token)
    assert sample_ids(logits, [one]) == [4]


@pytest.mark.parametrize(("drawn", "chosen"), [(0.0, 1), (math.nextafter(1.0, 0.0), 3)])
@pytest.mark.parametrize("params", [{}, {"top_p": 0.999999}])
def test_the_ends_of_the_distribution_never_give_an_impossible_token(params: dict, drawn: float, chosen: int) -> None:
    class Edge(SamplingState):
        def uniform(self) -> float:
            return drawn

    logits = torch.tensor([[-math.inf, 1.0, -math.inf, 0.5, -math.inf]])
    assert sample_ids(logits, [Edge(SamplingParams(**params), ())]) == [chosen]


def test_a_seeded_request_does_not_depend_on_its_batch() -> None:
    row = make_logits(1, 500)

    def draw(others: int) -> list[int]:
        mine = state(seed=42, top_p=0.9)
        batch = [*(state(top_k=3 + other) for other in range(others)), mine]
        noise = make_logits(others, 500, seed=others + 1)
        return [sample_ids(torch.cat((noise, row)), batch)[-1] for _ in range(40)]

    assert draw(0) == draw(1) == draw(6)
    assert len(set(draw(0))) > 5


def test_seeds_and_the_n_of_a_seeded_request_differ() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)

    def draw(**options) -> list[int]:
        one = state(**options)
        return [sample_ids(logits, [one])[0] for _ in range(4)]

    assert draw(seed=1) == draw(seed=1)
    assert draw(seed=-3) == draw(seed=-3)
    assert draw(seed=1) != draw(seed=2)
    assert draw(seed=1) != draw(seed=1, index=1)
    assert draw() != draw()


def test_logprobs_are_those_of_the_raw_logits_with_ranks() -> None:
    logits = make_logits(1, 30)
    (result,) = sample(logits, [state(seed=5, temperature=0.2, logit_bias={9: 100.0}, logprobs=3)])
    assert isinstance(result, SampledToken) and result.logprobs is not None
    expected = logits[0].log_softmax(0)
    order = expected.argsort(descending=True).tolist()
    assert result.token_id == 9
    assert result.logprobs.token_ids == [9, *order[:3]]
    assert result.logprobs.ranks == [order.index(9) + 1, 1, 2, 3]
    torch.testing.assert_close(torch.tensor(result.logprobs.logprobs), expected[result.logprobs.token_ids])


def test_logprobs_zero_gives_the_chosen_token_only() -> None:
    found = token_logprobs(make_logits(1, 30)[0], 4, 0)
    assert found.token_ids == [4]


@pytest.mark.parametrize("params", [{"temperature": 0}, {"temperature": 0, "logprobs": 1}, {"seed": 1, "top_p": 0.5}])
@pytest.mark.parametrize(("bad", "what"), [(math.nan, "NaN"), (math.inf, "no finite maximum")])
def test_bad_logits_fail_their_own_row_only(params: dict, bad: float, what: str) -> None:
    logits = make_logits(3)
    logits[1, 7] = bad
    results = sample(logits, [state(**params) for _ in range(3)])
    assert isinstance(results[1], SamplingFailure) and what in results[1].reason
    assert isinstance(results[0], SampledToken) and isinstance(results[2], SampledToken)


def test_options_that_leave_no_token_fail_the_row() -> None:
    one = state(temperature=0, stop_ids=(0, 1), min_tokens=1)
    (result,) = sample(torch.zeros(1, 2), [one])
    assert isinstance(result, SamplingFailure) and "leave no token" in result.reason


@pytest.mark.parametrize("num_allowed", [1, 3, 40, 63, 64])
def test_a_mask_leaves_what_it_allows_and_no_more(num_allowed: int) -> None:
    row = make_logits(1)[0]
    token_ids = np.random.default_rng(0).permutation(64)[:num_allowed].tolist()
    mask = TokenMask.of(token_ids, 64)
    expected = torch.full_like(row, -math.inf)
    expected[token_ids] = row[token_ids]
    before = row.clone()
    torch.testing.assert_close(mask.applied(row), expected, rtol=0, atol=0)
    torch.testing.assert_close(row, before, rtol=0, atol=0)
    assert mask.argmax(row.numpy()) == int(expected.argmax())


def test_no_rows() -> None:
    assert sample(torch.empty(0, 10), []) == []
