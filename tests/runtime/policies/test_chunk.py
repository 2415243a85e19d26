import math

import pytest

from tests.runtime.policies.items import Item, MillisecondsPerToken
from xllm_compile.runtime.policies.chunk import StepLoad, largest_chunk, load_of, step_budget


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


def test_without_targets_steps_have_no_limit() -> None:
    budget = step_budget([Item("a", 5, 4)], 0.0)
    assert (budget.seconds, budget.with_prompts_s(0.03)) == (math.inf, math.inf)


@pytest.mark.parametrize(
    ("alone_s", "budget_s"),
    # It has its token from the third step; where decodes take more than a third, prompts get a quarter of what is left.
    [(0.0, 0.02), (0.004, 0.02), (0.02, 0.03), (0.04, 0.045), (0.07, 0.06)],
)
def test_who_may_come_at_any_moment_has_its_next_token_within_its_target(alone_s: float, budget_s: float) -> None:
    assert step_budget([], 10.0, 0.06).with_prompts_s(alone_s) == pytest.approx(budget_s)
    relaxed = Item("a", 5, 4, tpot_slo_s=0.5, next_due_s=10.5)
    assert step_budget([relaxed], 10.0, 0.06).with_prompts_s(alone_s) == pytest.approx(budget_s)
    # Without prompts it joins the next step, whatever that takes.
    assert step_budget([relaxed], 10.0, 0.06).seconds == 0.06
    behind = Item("b", 5, 4, tpot_slo_s=0.02, next_due_s=9.0)
    assert step_budget([behind], 10.0, 0.06).with_prompts_s(0.0) == pytest.approx(0.013)


@pytest.mark.parametrize(
    ("next_due_s", "alone_s", "budget_s"),
    [
        # Short beside the target: what a sequence behind asks for.
        (9.0, 0.01, 0.0325),
        # They leave 10 ms, and prompts get half of it; or all of it while nobody is behind.
        (9.0, 0.04, 0.045),
        (10.047, 0.04, 0.047),
        (10.5, 0.04, 0.05),
        # Nothing is left, and the target stays the limit.
        (9.0, 0.05, 0.05),
        (9.0, 0.08, 0.05),
    ],
)
def test_prompts_keep_half_of_what_decodes_leave_whoever_is_behind(
    next_due_s: float, alone_s: float, budget_s: float
) -> None:
    behind = Item("a", 5, 4, tpot_slo_s=0.05, next_due_s=next_due_s)
    relaxed = Item("b", 5, 4, tpot_slo_s=0.5, next_due_s=10.5)
    assert step_budget([relaxed, behind], 10.0).with_prompts_s(alone_s) == pytest.approx(budget_s)


@pytest.mark.parametrize(("budget_s", "chunk"), [(0.03, 22), (0.0085, 0), (0.009, 1), (1.0, 100), (-1.0, 0)])
def test_the_largest_chunk_within_the_budget(budget_s: float, chunk: int) -> None:
    load = StepLoad(num_tokens=8)
    assert largest_chunk(load, 7, 100, budget_s, MillisecondsPerToken()) == chunk
