"""The solver against every allocation there is, on cores few enough to try them."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_compile.graph_passes.core_balance import Branch, balance_cores, divided


def every_allocation(branches, cube_cores, vector_cores):
    def shares(tables, cores):
        ranges = [range(1, cores + 1) if table else (0,) for table in tables]
        return [chosen for chosen in itertools.product(*ranges) if sum(chosen) <= cores]

    for xs in shares([branch.cube_s for branch in branches], cube_cores):
        for ys in shares([branch.vector_s for branch in branches], vector_cores):
            yield [branch.seconds(x, y) for branch, x, y in zip(branches, xs, ys, strict=True)]


CUBE, VECTOR = 5, 6
work = st.one_of(st.just(0.0), st.floats(0.1, 20.0))
evenly = st.builds(
    lambda cube, vector, fixed: Branch(
        name="b",
        cube_s=divided(cube, CUBE) if cube else (),
        vector_s=divided(vector, VECTOR) if vector else (),
        fixed_s=fixed,
    ),
    work,
    work,
    st.floats(0, 3),
)
# Tiles in rounds: more cores do not always help.
in_rounds = st.builds(
    lambda tiles, each: Branch(name="t", cube_s=tuple(math.ceil(tiles / x) * each for x in range(1, CUBE + 1))),
    st.integers(1, 12),
    st.floats(0.1, 5.0),
)


@settings(max_examples=150)
@given(st.lists(st.one_of(evenly, in_rounds), min_size=1, max_size=3), st.sampled_from([0.0, 0.05, 0.5, math.inf]))
def test_no_allocation_is_better(branches, slack):
    found = balance_cores(branches, CUBE, VECTOR, slack=slack)
    for (x, y), branch, seconds in zip(found.cores, branches, found.seconds, strict=True):
        assert (x >= 1) == bool(branch.cube_s) and (y >= 1) == bool(branch.vector_s)
        assert seconds == branch.seconds(x, y)
    assert sum(x for x, _ in found.cores) <= CUBE and sum(y for _, y in found.cores) <= VECTOR
    everything = list(every_allocation(branches, CUBE, VECTOR))
    shortest = min(max(seconds) for seconds in everything)
    allowed = [seconds for seconds in everything if max(seconds) <= shortest * (1 + slack)]
    assert found.makespan <= shortest * (1 + slack)
    assert (found.spread, found.makespan) == min((max(s) - min(s), max(s)) for s in allowed)


def test_operators_of_the_paper():
    """One product and one norm-like operator, each on its own unit, and a second product twice as large."""
    branches = [
        Branch(name="a", cube_s=divided(8.0, 24)),
        Branch(name="b", cube_s=divided(16.0, 24)),
        Branch(name="v", vector_s=divided(40.0, 48)),
    ]
    found = balance_cores(branches, 24, 48)
    assert found.cores == ((8, 0), (16, 0), (0, 40)) and found.seconds == (1.0, 1.0, 1.0)


@given(st.lists(st.floats(0.1, 20.0), min_size=2, max_size=CUBE))
def test_one_kind_of_cores_gains_nothing_where_work_divides_evenly(core_s):
    """Two branches on shares of a CPU's threads, say: taking turns with all of them keeps all of them busy."""
    found = balance_cores([Branch(name="b", cube_s=divided(work_s, CUBE)) for work_s in core_s], CUBE, 1, slack=0.0)
    assert found.makespan >= sum(core_s) / CUBE * (1 - 1e-12)


def test_evenness_alone_would_wait():
    branches = [Branch(name="a", cube_s=divided(10.0, 4)), Branch(name="b", vector_s=(10.0, 6.1, 5.2, 4.0))]
    assert balance_cores(branches, 4, 4, slack=math.inf).seconds == (10.0, 10.0)
    assert balance_cores(branches, 4, 4, slack=0.0).seconds == (10 / 3, 4.0)


@pytest.mark.parametrize(
    ("branches", "said"),
    [
        ([Branch(name=str(i), cube_s=(1.0, 1.0)) for i in range(3)], "3 branches have cube work, there are 2"),
        ([Branch(name="a", vector_s=(1.0,))], "vector times for another number of cores than 2"),
        ([], "there must be a branch"),
    ],
)
def test_impossible_problems(branches, said):
    with pytest.raises(ValueError, match=said):
        balance_cores(branches, 2, 2)


def test_negative_times():
    with pytest.raises(ValueError, match="branch a has negative times"):
        Branch(name="a", cube_s=(1.0, -1.0))
