import pytest

from xllm_compile.runtime.policies.planning_lead import PlanningLead, planning_lead_s


@pytest.mark.parametrize(("step_s", "lead_s"), [(0.001, 0.001), (0.005, 0.005), (0.02, 0.007), (0.1, 0.015)])
def test_short_steps_are_planned_at_once_and_long_ones_late(step_s: float, lead_s: float) -> None:
    assert planning_lead_s(step_s) == pytest.approx(lead_s)


def test_where_the_host_is_late_steps_are_planned_earlier_for_a_while() -> None:
    lead = PlanningLead()
    assert lead.seconds(0.1) == pytest.approx(planning_lead_s(0.1))
    lead.learn(was_late=True)
    assert lead.seconds(0.1) == pytest.approx(0.025)
    for _ in range(10):
        lead.learn(was_late=True)
    assert lead.seconds(0.1) == 0.1
    for _ in range(300):
        lead.learn(was_late=False)
    assert lead.seconds(0.1) == pytest.approx(planning_lead_s(0.1))
