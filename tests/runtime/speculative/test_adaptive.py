import itertools
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_compile.runtime.speculative.adaptive import (
    Acceptance,
    Looks,
    Probes,
    Room,
    StepSeconds,
    draft_lengths,
    num_forced_worth,
)


def lengths(survivals: list[list[float]], *, row: float = 0.05, draft: float = 0.0, others: int = 0) -> list[int]:
    """With a step of 1 + row x rows and a draft that costs ``draft`` a token."""
    return draft_lengths(
        survivals, num_others=others, step_seconds=lambda rows: 1 + row * rows, draft_seconds=lambda k: draft * k
    )


def test_what_is_accepted_is_drafted_and_what_is_not_is_not() -> None:
    assert lengths([[0.9, 0.8, 0.7]]) == [3]
    assert lengths([[0.04, 0.03, 0.02]]) == [0]
    assert lengths([[0.5, 0.3, 0.05]]) == [2]
    assert lengths([[0.9, 0.8, 0.7], [0.03, 0.02, 0.01]]) == [3, 0]
    assert lengths([]) == []


def test_costs_shorten_drafts() -> None:
    survival = [0.8**k for k in range(1, 9)]
    free, cheap, dear = (lengths([survival], draft=cost)[0] for cost in (0.0, 0.2, 0.9))
    assert free > cheap > dear == 0
    # A full machine, where each row costs what it brings.
    assert lengths([survival] * 4, row=1.0) == [0] * 4


# Less likely guesses are never made.
CHANCES = st.just(0.0) | st.floats(0.02, 1)


@given(
    st.lists(st.lists(CHANCES, max_size=4).map(lambda chances: sorted(chances, reverse=True)), max_size=3),
    st.floats(0, 0.5),
    st.floats(0, 0.5),
)
def test_no_other_choice_is_expected_to_bring_more(survivals: list[list[float]], row: float, draft: float) -> None:
    def rate(chosen: tuple[int, ...]) -> float:
        tokens = len(chosen) + sum(sum(s[:k]) for s, k in zip(survivals, chosen, strict=True))
        return tokens / (1 + row * (len(chosen) + sum(chosen)) + draft * max(chosen))

    if survivals:
        found = tuple(lengths(survivals, row=row, draft=draft))
        best = max(rate(tuple(map(int, at))) for at in np.ndindex(*(len(s) + 1 for s in survivals)))
        # Longest first is not searched with costly drafts: the greedy order may miss what a common length would give.
        assert rate(found) >= (0.95 if draft == 0 else 0.75) * best


def test_acceptance_follows_what_happens_and_a_new_sequence_starts_from_the_others() -> None:
    shared = Acceptance(4)
    sequence = Acceptance(4, shared)
    for _ in range(60):
        sequence.update(4, 2)
    assert sequence.rate(0) > 0.95 and sequence.rate(1) > 0.95
    assert sequence.rate(2) < 0.1
    assert sequence.survival == sorted(sequence.survival, reverse=True)
    assert Acceptance(4, shared).rate(2) < 0.2 < 0.9 < Acceptance(4, shared).rate(0)
    for _ in range(40):
        sequence.update(4, 0)
    assert sequence.rate(0) < 0.2


def test_probes_come_ever_more_rarely_until_one_is_accepted() -> None:
    probes = Probes()

    def gap(num_steps: int = 1) -> int:
        return num_steps * next(asked for asked in itertools.count(1) if probes.is_due(num_steps))

    gaps = []
    for _ in range(6):
        gaps.append(gap())
        probes.verified(2, 0)
    assert gaps == [128, 256, 512, 1024, 1024, 1024]
    # As frequent where it is asked rarely.
    assert gap(8) == 1024
    # Half of one is no sign.
    probes.verified(2, 1)
    assert gap() == 1024
    probes.verified(2, 2)
    assert gap() == 8
    # One that was expected to pay is longer.
    probes.verified(2, 0)
    assert gap() == 16
    probes.verified(5, 2)
    assert gap() == 8


def test_a_text_without_drafts_is_looked_at_ever_more_rarely_until_one_pays() -> None:
    looks, due = Looks(), []
    for step in range(200):
        is_far = looks.is_far
        if looks.is_due():
            assert not is_far
            due.append(step)
            looks.found(pays=False)
    gaps = [after - before for before, after in pairwise(due)]
    assert gaps == sorted(gaps) and gaps[:7] == [1] * 7 and max(gaps) == 8
    assert len(due) < 50
    while not looks.is_due():
        pass
    looks.found(pays=True)
    for _ in range(5):
        assert not looks.is_far and looks.is_due()
        looks.found(pays=True)


@pytest.mark.parametrize(("patience", "num_looks"), [(8, 56), (2, 26)])
def test_with_little_patience_looks_are_soon_rare(patience: int, num_looks: int) -> None:
    looks, due = Looks(64, patience=patience), 0
    for _ in range(1024):
        if looks.is_due():
            due += 1
            looks.found(pays=False)
    assert due == num_looks


def test_an_accepted_draft_has_a_text_looked_at_at_once() -> None:
    looks = Looks()
    for _ in range(100):
        if looks.is_due():
            looks.found(pays=False)
    assert looks.is_far
    looks.hurry()
    assert looks.is_due()


def test_step_times_are_measured_and_the_rest_is_scaled() -> None:
    seconds = StepSeconds(lambda rows: 1 + 0.1 * rows)
    assert seconds(3) == pytest.approx(1.3)
    for _ in range(50):
        seconds.observe(1, 2.2)
    assert seconds(1) == pytest.approx(2.2)
    assert seconds(5) == pytest.approx(3.0)
    for _ in range(50):
        seconds.observe(5, 2.4)
    assert seconds(5) == pytest.approx(2.4, rel=0.01)
    # A step that something else interrupted hardly moves the estimate.
    seconds.observe(1, 500.0)
    assert seconds(1) <= 2.2 * 1.06
    # Of the first ones the quickest counts, and bad ones not for long.
    for taken in ((80.0, 1.0), (80.0, 1.0, 90.0), (*[80.0] * 6, *[1.0] * 20)):
        seconds = StepSeconds(lambda rows: 1.0)
        for each in taken:
            seconds.observe(1, each)
        assert seconds(1) == pytest.approx(1.0, rel=0.1)


def test_first_steps_of_a_size_are_not_believed_to_be_slower_than_predicted() -> None:
    seconds = StepSeconds(lambda rows: 1 + 0.01 * rows, ratio=1.0)
    for _ in range(3):
        seconds.observe(5, 9.0)
        assert seconds(5) < 1.2
    seconds.observe(5, 9.0)
    assert seconds(5) == 9.0


def test_what_one_graph_runs_takes_the_same_time() -> None:
    seconds = StepSeconds(lambda rows: 1 + 0.001 * rows, graph_rows=lambda rows: 10 if rows <= 10 else 20)
    for _ in range(5):
        seconds.observe(8, 1.0)
        seconds.observe(11, 2.0)
    assert seconds(3) == seconds(10) == pytest.approx(1.0) and seconds(12) == seconds(20) == pytest.approx(2.0)
    assert not seconds.is_stale(20) and not seconds.is_unsure(1)
    # Two more rows cost nothing, and ten more would only make up for the larger graph.
    forced = partial(num_forced_worth, num_rows=8, num_tokens=8, step_seconds=seconds)
    assert [forced(count) for count in (1, 2, 7, 12)] == [1, 2, 2, 2]
    filling = partial(forced, graph_rows=seconds.graph_rows)
    assert [filling(count) for count in (1, 2, 7, 12)] == [1, 2, 2, 2]


def test_a_graph_is_filled_with_forced_tokens_or_not_taken() -> None:
    asked: list[int] = []

    def seconds(rows: int) -> float:
        asked.append(rows)
        return 1.0 if rows <= 16 else 1.5 if rows <= 32 else 9.0

    forced = partial(num_forced_worth, num_rows=8, num_tokens=8, step_seconds=seconds)
    sizes = (8, 16, 32, 512)
    filling = partial(forced, graph_rows=lambda rows: next(size for size in sizes if size >= rows))
    assert filling(8) == 8 and filling(30) == 24
    assert set(asked) == {8, 16, 32, 38}
    # Eight tokens more would not make up for the larger graph.
    assert filling(9) == 8


def test_a_bad_moment_of_one_size_is_forgotten() -> None:
    seconds = StepSeconds(lambda rows: 1 + 0.01 * rows)
    for rows in (1, 5, 5, 5, 5, 5):
        seconds.observe(rows, 1.0 if rows == 1 else 9.0)
    assert seconds(5) > 1.5
    for _ in range(200):
        seconds.observe(1, 1.0)
    assert seconds(5) < 1.2


def test_a_small_step_is_not_taken_to_be_slower_than_a_larger_one() -> None:
    seconds = StepSeconds(lambda rows: 1 + 0.001 * rows)
    assert seconds.is_stale(1)
    seconds.observe(1, 90.0)
    for _ in range(100):
        seconds.observe(5, 2.0)
    # Nothing but drafts of four tokens since: plain decoding must not look dear for ever.
    assert seconds(1) <= seconds(3) <= seconds(5) == pytest.approx(2.0, rel=0.05)
    assert not seconds.is_stale(1)
    for _ in range(30):
        seconds.observe(5, 2.0)
    assert seconds.is_stale(1)
    seconds.observe(1, 1.0)
    assert seconds(1) == pytest.approx(1.0, rel=0.1) and seconds(3) < 2.1
    assert draft_lengths([[0.1, 0.05]], num_others=0, step_seconds=seconds, draft_seconds=lambda k: 0.3 * k) == [0]


def test_room_for_forced_tokens_follows_what_is_used_of_it() -> None:
    room = Room(16)
    for _ in range(100):
        room.used(1)
    assert room.size == 4
    # One step in eight that uses more than a quarter keeps it.
    for at in range(100):
        room.used(2 if at % 8 == 0 else 0)
    assert room.size == 4
    for size in (8, 16, 16):
        room.used(room.size)
        assert room.size == size
    for at in range(100):
        room.used(5 if at % 8 == 0 else 0)
    assert room.size == 16
