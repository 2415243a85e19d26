"""Statistics and the order of measurements, with a fake clock."""

import pytest

from xllm_compile.benchmarks.timing import measure, measure_in_turns, percentile, summarise


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_percentiles_interpolate_between_ranks():
    values = [40.0, 10.0, 30.0, 20.0]
    assert percentile(values, 0) == 10
    assert percentile(values, 50) == 25
    assert percentile(values, 100) == 40
    assert percentile(values, 90) == pytest.approx(37)
    assert percentile([5.0], 99) == 5


def test_a_percentile_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        percentile([], 50)
    with pytest.raises(ValueError, match="percent=101"):
        percentile([1.0], 101)


def test_a_summary_keeps_the_order_of_its_values():
    summary = summarise([3.0, 1.0, 2.0])
    assert (summary.median, summary.min, summary.max) == (2, 1, 3)
    assert summary.to_json()["values"] == [3, 1, 2]
    with pytest.raises(ValueError, match="at least one"):
        summarise([])


def test_warm_up_calls_do_not_count():
    clock = FakeClock()
    costs = iter([100.0, 50.0, 1.0, 2.0, 3.0])

    def run() -> None:
        clock.now += next(costs)

    assert measure(run, warmup=2, repeats=3, clock=clock).values == (1, 2, 3)


def test_rounds_alternate_their_order():
    clock = FakeClock()
    order: list[str] = []

    def make(name: str, cost: float):
        def run() -> None:
            order.append(name)
            clock.now += cost

        return run

    found = measure_in_turns({"a": make("a", 1), "b": make("b", 2)}, warmup=1, repeats=3, clock=clock)
    assert "".join(order) == "ba" + "ab" + "ba" + "ab"
    assert found["a"].values == (1, 1, 1)
    assert found["b"].values == (2, 2, 2)
