"""The native draw against the sorted vocabulary in float64."""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.runtime.test_sampler import kept_by_sorting
from xllm_compile.runtime.draw import Draw, draw_plainly, draw_tokens
from xllm_compile.runtime.sampling_params import SamplingParams

VOCAB_SIZE = 151_936

pytestmark = pytest.mark.usefixtures("kernels")


def make_row(vocab_size: int, scale: float, seed: int = 0) -> Tensor:
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def check_draws(row: Tensor, uniforms: list[float], **options: Any) -> None:
    """Each token is kept, and is the one at its number's share of what is kept."""
    params = SamplingParams(**options)
    kept = kept_by_sorting(row, params.temperature, params.top_k, params.top_p, params.min_p)
    probabilities = (row.double() / params.temperature).softmax(0).numpy()
    found = draw_tokens([Draw(row, params, uniform) for uniform in uniforms])
    inside = np.zeros(len(row))
    inside[list(kept)] = probabilities[list(kept)]
    cumulative = inside.cumsum() / inside.sum()
    # Of equal probabilities others may be in, and with rounding one more or less is.
    smallest = min(probabilities[list(kept)])
    tolerance = 1e-5 + 2 * smallest / inside.sum()
    for token, uniform in zip(found, uniforms, strict=True):
        assert token is not None
        assert probabilities[token] >= smallest * (1 - 1e-5)
        before = cumulative[token - 1] if token else 0.0
        assert before - tolerance <= uniform <= cumulative[token] + tolerance


@settings(max_examples=200)
@given(
    vocab_size=st.sampled_from([1, 3, 15, 16, 50, 257, 1024, 1025, 5000]),
    scale=st.sampled_from([0.01, 1.0, 8.0, 300.0]),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 7, 300, 6000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.31, 1e-6]),
    min_p=st.sampled_from([0.0, 0.001, 0.2, 1.0]),
    seed=st.integers(0, 5),
)
def test_a_token_is_where_sorting_the_vocabulary_puts_it(
    vocab_size: int, scale: float, temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    uniforms = [0.0, *(random.Random(seed).random() for _ in range(20)), math.nextafter(1.0, 0.0)]
    row = make_row(vocab_size, scale, seed)
    check_draws(row, uniforms, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)


@pytest.mark.parametrize("scale", [0.001, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.05}, {"top_k": 9999, "top_p": 0.5}])
def test_a_large_vocabulary_peaked_or_flat(scale: float, options: dict[str, Any]) -> None:
    rng = random.Random(1)
    check_draws(make_row(VOCAB_SIZE, scale), [rng.random() for _ in range(8)], **options)


@pytest.mark.parametrize(
    ("options", "num_kept"),
    [
        ({}, 5000),
        ({"top_k": 7}, 7),
        ({"top_p": 0.25}, 1250),
        ({"top_k": 100, "top_p": 0.5}, 50),
        ({"min_p": 1.0}, 5000),
    ],
)
def test_of_equal_logits_the_first_tokens_stay(options: dict[str, Any], num_kept: int) -> None:
    row, params = torch.zeros(5000), SamplingParams(**options)
    draws = [Draw(row, params, (token + 0.5) / num_kept) for token in range(num_kept)]
    assert draw_tokens(draws) == list(range(num_kept))
    assert draw_tokens([Draw(row, params, math.nextafter(1.0, 0.0))]) == [num_kept - 1]


def test_a_row_gives_the_same_token_alone_and_in_a_batch() -> None:
    rng = random.Random(2)
    options: list[dict[str, Any]] = [{}, {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.1, "temperature": 0.5}]
    draws = [
        Draw(make_row(VOCAB_SIZE, 2.0, seed), SamplingParams(**options[seed % 4]), rng.random()) for seed in range(9)
    ]
    assert draw_tokens(draws) == [token for draw in draws for token in draw_tokens([draw])]
    assert draw_tokens([]) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 700, 1029])
def test_a_bad_row_is_told(bad: float, at: int) -> None:
    rows = [make_row(1030, 1.0, seed) for seed in range(3)]
    rows[1][at] = bad
    found = draw_tokens([Draw(row, SamplingParams(top_p=0.9), 0.5) for row in rows])
    assert found[1] is None and found[0] is not None and found[2] is not None
    assert draw_tokens([Draw(torch.full((40,), -math.inf), SamplingParams(), 0.5)]) == [None]


def test_forbidden_tokens_are_never_drawn() -> None:
    row = torch.full((3000,), -math.inf)
    row[[17, 1500, 2999]] = torch.tensor([1.0, 0.5, 0.9])
    for params in (SamplingParams(), SamplingParams(top_k=2000), SamplingParams(top_p=0.999999)):
        found = draw_tokens([Draw(row, params, at / 50) for at in range(50)])
        assert set(found) == {17, 1500, 2999}


def test_it_is_what_stands_in_for_it() -> None:
    rng = random.Random(3)
    every: list[dict[str, Any]] = [{}, {"top_p": 0.95}, {"top_k": 20, "temperature": 0.7}, {"min_p": 0.02}]
    for options in every:
        row, params = make_row(4096, 3.0), SamplingParams(**options)
        draws = [Draw(row, params, rng.random()) for _ in range(100)]
        assert draw_tokens(draws) == [draw_plainly(draw) for draw in draws]
