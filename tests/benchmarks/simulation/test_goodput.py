import pytest

from xllm_compile.benchmarks.simulation.goodput import highest_rate


@pytest.mark.parametrize("limit", [0.9, 7.0, 31.0, 500.0])
def test_the_limit_is_found_for_each_seed(limit):
    found = highest_rate(lambda rate, seed: rate / (limit + seed), lambda value: value <= 1, (0, 1, 2), start=10.0)
    for seed, rate in enumerate(found.rates):
        assert limit + seed == pytest.approx(rate, rel=0.025) and rate <= limit + seed
    assert found.median == sorted(found.rates)[1]
    assert len(found.points) < 60


def test_nothing_sustained_is_zero():
    found = highest_rate(lambda rate, seed: 1.0, lambda value: value < 1, (0,), start=8.0)
    assert found.rates == (0.0,)
