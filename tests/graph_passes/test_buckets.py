"""Bucket choice against all subsets, on histograms small enough to try them."""

import itertools
import random

import pytest

from xllm_compile.graph_passes.buckets import (
    PADDED_ROW,
    choose_buckets,
    default_histogram,
    padded_tokens,
    workload_histogram,
)
from xllm_compile.graph_passes.step_cost import StepTimes

# Flat, then a stair, then a slope: as a device that reads weights, then fills tiles, then computes.
TIMES = StepTimes(sizes=(1, 16, 17, 32, 512), seconds=(20.0, 21.0, 26.0, 27.0, 300.0), dynamic_overhead=1.1)


def expected_cost(histogram, buckets):
    total = 0.0
    for size, weight in histogram.items():
        if size in buckets:
            total += weight * TIMES.of(size)
        else:
            bucket = min(bucket for bucket in buckets if bucket > size)
            row = PADDED_ROW * (TIMES.of(buckets[-1]) - TIMES.of(1)) / max(1, buckets[-1] - 1)
            total += weight * min(TIMES.of(size) * 1.1, TIMES.of(bucket) + (bucket - size) * row)
    return total


def least_cost(histogram, max_size, max_buckets):
    others = sorted(set(histogram) - {max_size})
    return min(
        expected_cost(histogram, (*chosen, max_size))
        for count in range(min(max_buckets, len(others) + 1))
        for chosen in itertools.combinations(others, count)
    )


@pytest.mark.parametrize("seed", range(40))
def test_no_other_choice_costs_less(seed):
    rng = random.Random(seed)
    max_size = rng.choice([1, 8, 60, 512])
    sizes = rng.sample(range(1, max_size + 1), min(max_size, rng.randint(1, 9)))
    histogram = {size: rng.random() * 10 ** rng.randint(-2, 2) for size in sizes}
    for budget in (1, 2, 3, 20):
        chosen = choose_buckets(histogram, max_size, budget, TIMES)
        assert len(chosen) <= budget
        assert chosen == tuple(sorted(set(chosen))) and chosen[-1] == max_size
        assert expected_cost(histogram, chosen) == pytest.approx(least_cost(histogram, max_size, budget), rel=1e-12)


def test_enough_buckets_for_all_sizes():
    assert choose_buckets({1: 1.0, 7: 2.0, 300: 0.5}, 512, 4, TIMES) == (1, 7, 300, 512)


def test_nothing_known():
    assert choose_buckets({}, 16, 3, TIMES) == (16,)


@pytest.mark.parametrize(
    ("histogram", "budget", "message"),
    [({1: 1.0}, 0, "max_buckets=0"), ({0: 1.0}, 1, r"\[0\].*\[1, 8\]"), ({9: 1.0}, 1, r"\[9\].*\[1, 8\]")],
)
def test_bad_input(histogram, budget, message):
    with pytest.raises(ValueError, match=message):
        choose_buckets(histogram, 8, budget, TIMES)


@pytest.mark.parametrize("max_size", [1, 5, 64, 80, 512])
def test_default_histogram_is_within_its_sizes(max_size):
    histogram = default_histogram(max_size)
    assert all(1 <= size <= max_size and weight > 0 for size, weight in histogram.items())
    assert choose_buckets(histogram, max_size, 6, TIMES)[-1] == max_size


def test_a_workload_is_counted_in_steps():
    histogram = workload_histogram([(130, 0), (64, 0), (20, 0)], 64)
    assert {size: weight for size, weight in histogram.items() if weight} == {64: 3, 2: 1, 20: 1}
    # A batch of n serves n tokens in one step, so tokens come back as outputs.
    served = workload_histogram([(64, 100)], 64)
    assert sum(size * weight for size, weight in served.items()) == pytest.approx(64 + 100)


def test_padded_tokens():
    histogram = {3: 2.0, 4: 1.0, 20: 1.0}
    assert padded_tokens(histogram, (32, 4)) == 2 * 1 + 12
    # 20 rows take 26.2 s on the dynamic graph's 28.8 against 27 padded: padding pays; from 17 to 512 it does not.
    assert padded_tokens(histogram, (4, 32), TIMES) == 2 * 1 + 12
    assert padded_tokens(histogram, (4, 512), TIMES) == 2 * 1


def test_many_sizes_share_candidates():
    histogram = dict.fromkeys(range(1, 6001), 1.0)
    chosen = choose_buckets(histogram, 6000, 4, TIMES)
    assert len(chosen) == 4 and chosen[-1] == 6000 and all(size % 3 == 0 for size in chosen)
