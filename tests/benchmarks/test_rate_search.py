"""Few tries close in on the rate at which enough requests are served well."""

import math

import pytest

from xllm_compile.benchmarks.rate_search import bracket, crossing


@pytest.mark.parametrize("truth", [2.0, 5.0, 11.0])
def test_rates_close_in_on_what_is_sustained(truth):
    tried = {}

    def measure(rate):
        tried[rate] = 0.95 if rate <= truth else 0.6
        return tried[rate]

    bracket(measure, 0.9, start=5.0, max_tries=8)
    assert min(abs(math.log(rate / truth)) for rate in tried) < 0.1
    assert len(tried) == 8


@pytest.mark.parametrize(("truth", "num_tried"), [(2.0, 6), (5.0, 3), (12.0, 5), (100.0, 6)])
def test_it_goes_on_while_the_sustained_rate_lies_beyond_all_that_were_tried(truth, num_tried):
    tried = []

    def measure(rate):
        tried.append(rate)
        return 0.95 if rate <= truth else 0.6

    bracket(measure, 0.9, start=5.5, max_tries=3)
    assert len(tried) == num_tried


def test_the_sustained_rate_lies_where_the_share_falls_to_nine_tenths():
    assert crossing({4.0: 1.0, 6.0: 0.8}, 0.9) == pytest.approx(5.0)
    assert crossing({6.0: 0.8, 5.0: 0.95, 4.0: 1.0}, 0.9) == pytest.approx(5 + 1 / 3)
    assert crossing({4.0: 1.0, 5.0: 0.95}, 0.9) == 5.0
    assert crossing({4.0: 0.45, 5.0: 0.2}, 0.9) == pytest.approx(2.0)
