import math

import pytest

from tests.runtime.policies.items import Item, MillisecondsPerToken
from xllm_compile.runtime.policies.chunk import StepLoad, awaited_step_s, largest_chunk, load_of, step_budget


def test_the_load_of_a_step() -> None:
    chunks = [(Item("a", 11, 10), 1), (Item("b", 30, 4), 3)]
    # "b" computes (5 + 6 + 7) pairs, 7 of which are those of one query on all keys.
    assert load_of(chunks) == StepLoad(num_tokens=4, num_seqs=2, num_keys=11 + 7, num_pairs=4 + 4 + 1 + 2)
    assert load_of(chunks) == StepLoad().plus(10, 1).plus(4, 3)


@pytest.mark.parametrize(
    ("next_due_s", "budget_s"),
    [(10.04, 0.04), (10.5, 0.05), (10.001, 0.0325), (9.0, 0.0325), (math.inf, 0.05)],
)
def test_a_step_keeps_the_target_and_makes_up_for_delay(next_due_s: float, budget_s: float) -> None:
    item = Item("a", 5, 4, tpot_slo_s=0.05, next_due_s=next_due_s)
    relaxed = Item("b", 5, 4, tpot_slo_s=0.5)
    assert step_budget([relaxed, item, Item("c", 5, 4)], 10.0).seconds == pytest.approx(budget_s)


def test_prompts_fill_a_step_to_a_little_less_than_the_target() -> None:
    item = Item("a", 5, 4, tpot_slo_s=0.05, next_due_s=10.5, num_growth_tokens=100)
    budget = step_budget([item], 10.0)
    assert budget.seconds == 0.05
    assert budget.with_prompts_s(0.01) == pytest.approx(0.045)


def test_without_targets_steps_have_no_limit() -> None:
    budget = step_budget([Item("a", 5, 4)], 0.0)
    assert (budget.seconds, budget.with_prompts_s(0.03)) == (math.inf, math.inf)


@pytest.mark.parametrize(
    ("num_output_tokens", "step_s"),
    # With a token to come: its way, the step under way and its own take the target. Each one more makes up for 0.35.
    [(2, 0.02), (3, 0.027), (5, 0.041), (7, 0.055), (8, 0.06), (1000, 0.06), (math.inf, 0.06)],
)
def test_who_may_come_at_any_moment_can_keep_its_target(num_output_tokens: float, step_s: float) -> None:
    assert awaited_step_s(0.06, num_output_tokens) == pytest.approx(step_s)


def test_steps_are_short_while_somebody_is_awaited() -> None:
    relaxed = Item("a", 5, 4, tpot_slo_s=0.5, next_due_s=10.5, num_growth_tokens=100)
    for decodes in ([], [relaxed]):
        budget = step_budget(decodes, 10.0, 0.02)
        assert budget.seconds == 0.02
        assert budget.with_prompts_s(0.0) == pytest.approx(0.018)
        # There is no time for prompts, but for their least chunk.
        assert budget.with_prompts_s(0.03) == pytest.approx(0.018)
    behind = Item("b", 5, 4, tpot_slo_s=0.02, next_due_s=9.0, num_growth_tokens=100)
    assert step_budget([behind], 10.0, 0.06).with_prompts_s(0.0) == pytest.approx(0.013)


@pytest.mark.parametrize(
    ("next_due_s", "num_growth_tokens", "budget_s"),
    [
        # Its last token is due in 20 ms, or in 16.7 as soon as a step can be; two steps make up for 17.5.
        (10.02, 0, 0.018),
        (9.99, 1, 0.015),
        (10.01, 1, 0.02475),
        # With many it is like any that is behind, and so is one that is late whatever is done.
        (10.02, 2, 0.0325),
        (9.0, 1000, 0.0325),
        (10.01, 0, 0.0325),
        (9.9, 5, 0.0325),
    ],
)
def test_what_cannot_be_made_up_for_later_shortens_the_step(
    next_due_s: float, num_growth_tokens: int, budget_s: float
) -> None:
    item = Item("a", 5, 4, tpot_slo_s=0.05, next_due_s=next_due_s, num_growth_tokens=num_growth_tokens)
    assert step_budget([item], 10.0).with_prompts_s(0.01) == pytest.approx(budget_s)


@pytest.mark.parametrize(
    ("next_due_s", "alone_s", "budget_s"),
    [
        # Short beside the target: what a sequence behind asks for.
        (9.0, 0.01, 0.0325),
        # They leave 5 ms, and prompts get half of it; or all of it while nobody is behind.
        (9.0, 0.04, 0.0425),
        (10.044, 0.04, 0.044),
        (10.5, 0.04, 0.045),
        # Nothing is left, and the target stays the limit.
        (9.0, 0.045, 0.045),
        (9.0, 0.08, 0.045),
    ],
)
def test_prompts_keep_half_of_what_decodes_leave_whoever_is_behind(
    next_due_s: float, alone_s: float, budget_s: float
) -> None:
    behind = Item("a", 5, 4, tpot_slo_s=0.05, next_due_s=next_due_s, num_growth_tokens=1000)
    relaxed = Item("b", 5, 4, tpot_slo_s=0.5, next_due_s=10.5, num_growth_tokens=1000)
    assert step_budget([relaxed, behind], 10.0).with_prompts_s(alone_s) == pytest.approx(budget_s)


@pytest.mark.parametrize(("budget_s", "chunk"), [(0.03, 22), (0.0085, 0), (0.009, 1), (1.0, 100), (-1.0, 0)])
def test_the_largest_chunk_within_the_budget(budget_s: float, chunk: int) -> None:
    load = StepLoad(num_tokens=8)
    assert largest_chunk(load, 7, 100, budget_s, MillisecondsPerToken()) == chunk
