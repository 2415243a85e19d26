"""The table of step times: what it stores, what lies between, what it decides."""

import pytest

from xllm_compile.graph_passes.step_cost import StepTimes, table_sizes, tabulate

TIMES = StepTimes(sizes=(1, 16, 32), seconds=(10.0, 13.0, 29.0), dynamic_overhead=1.2)


def test_straight_lines_between_and_beyond():
    assert [TIMES.of(size) for size in (1, 6, 16, 24, 32, 48)] == pytest.approx([10, 11, 13, 21, 29, 45])
    assert TIMES.of_dynamic(24) == pytest.approx(25.2)
    assert StepTimes(sizes=(4,), seconds=(2.0,), dynamic_overhead=1.0).of(100) == 2.0


def test_padding_pays_until_the_dynamic_graph_is_faster():
    assert TIMES.padding_pays(6, 16) and TIMES.padding_pays(28, 32)
    assert not TIMES.padding_pays(17, 32)
    found = [TIMES.bucket_for(size, (6, 16, 32)) for size in (1, 6, 7, 16, 17, 28, 32, 33)]
    assert found == [6, 6, 16, 16, None, 32, 32, None]


@pytest.mark.parametrize("largest", [1, 5, 64, 65, 512, 8192])
def test_a_table_reproduces_its_function(largest):
    sizes = table_sizes(largest)
    assert sizes[0] == 1 and sizes[-1] == largest and len(sizes) < 150
    times = tabulate(lambda size: 20.0 + size, largest, 1.1)
    assert all(times.of(size) == pytest.approx(20 + size) for size in range(1, largest + 1))
    assert StepTimes.from_json(times.to_json()) == times


@pytest.mark.parametrize("values", [{"sizes": ()}, {"sizes": (2, 1)}, {"sizes": (0, 1)}, {"dynamic_overhead": 0.9}])
def test_bad_tables(values):
    good = {"sizes": (1, 2), "seconds": (1.0, 2.0), "dynamic_overhead": 1.1}
    with pytest.raises(ValueError, match="sizes"):
        StepTimes(**{**good, **values})
