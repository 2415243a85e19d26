import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_compile.runtime.policies.chunk import StepLoad, step_budget
from xllm_compile.runtime.policies.offline import OfflineRules, num_in_time

RULES = OfflineRules()


class Model:
    """A step takes 10 ms, and 1 ms for each token and each 1000 keys."""

    def seconds(self, load: StepLoad) -> float:
        return 0.01 + 1e-3 * load.num_tokens + 1e-6 * load.num_keys


class Online:
    """The first token was there at 0, and has been followed by so many."""

    def __init__(self, num_more: int, tpot_slo_s: float | None = 0.1) -> None:
        self.tpot_slo_s = tpot_slo_s
        self.num_growth_tokens = 100
        self.next_due_s = math.inf if tpot_slo_s is None else (num_more + 1) * tpot_slo_s


@given(
    num_online=st.integers(0, 60),
    contexts=st.lists(st.integers(1, 4000), max_size=100),
    budget_s=st.floats(0.0, 0.3),
)
def test_the_first_ones_ride_up_to_the_budget_and_no_further(num_online, contexts, budget_s):
    online = StepLoad(num_online, num_online, num_online * 500)
    count = num_in_time(online, contexts, budget_s, Model())

    def step_s(more):
        num_seqs, num_keys = num_online + more, online.num_keys + sum(contexts[:more]) + more
        return Model().seconds(StepLoad(num_seqs, num_seqs, num_keys))

    assert 0 <= count <= len(contexts)
    assert count == 0 or step_s(count) <= budget_s
    assert count == len(contexts) or step_s(count + 1) > budget_s
    assert num_in_time(online, contexts, math.inf, Model()) == len(contexts)


def test_late_online_sequences_shorten_the_steps_that_offline_ones_ride_in():
    offline = [1000] * 100

    def riding(num_more, now):
        budget_s = RULES.budget_s(step_budget([Online(num_more)], now).seconds, None)
        return num_in_time(StepLoad(1, 1, 500), offline, budget_s, Model())

    # In time: 98 of 100 ms. It waited for two steps before it could join: 65 of 100 ms until it has caught up.
    assert riding(10, 1.0) == 43
    assert riding(0, 0.2) == 26
    assert riding(9, 0.92) == 33
    assert RULES.budget_s(step_budget([Online(0, None)], 0.2).seconds, None) == math.inf


def test_online_prompts_are_held_up_by_a_tenth_at_most():
    assert RULES.budget_s(math.inf, 0.05) == pytest.approx(0.055)
    assert RULES.budget_s(0.1, 0.05) == pytest.approx(0.055)
    assert RULES.budget_s(0.05, 0.05) == pytest.approx(0.049)


def test_steps_of_offline_prompts_keep_the_usual_target():
    assert OfflineRules.within(0.03) == OfflineRules(step_s=0.03)
    assert OfflineRules.within(0.5) == OfflineRules.within(None) == RULES


@pytest.mark.parametrize("values", [{"tpot_share": 1.1}, {"prefill_share": -0.1}, {"step_s": 0.0}])
def test_bad_rules_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        OfflineRules(**values)
