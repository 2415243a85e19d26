"""Shares of a CPU's threads, planned: what the solver finds against every share there is."""

import pytest

from xllm_compile.benchmarks.bench_cores import server_spec
from xllm_compile.benchmarks.planned_models import planned_regions
from xllm_compile.benchmarks.thread_shares import PARTS, plan_shares
from xllm_compile.graph_passes.cost_model import CostModel
from xllm_compile.graph_passes.node_cost import region_costs
from xllm_compile.graph_passes.step_shape import StepShape


@pytest.fixture(scope="module")
def layer():
    return planned_regions("qwen3-0.6b")[1][0]


def seconds(layer, part, cores):
    return CostModel(spec=server_spec(cores)).total_seconds(cost for _, cost in region_costs(layer, part))


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("cores", [2, 8, 24])
def test_no_other_share_is_planned_to_be_quicker(layer, parts, cores):
    plan = plan_shares(layer, parts, cores)
    tried = [
        max(seconds(layer, part, share) for part, share in zip(parts, (mine, cores - mine), strict=True))
        for mine in range(1, cores)
    ]
    bytes_cold = sum(cost.bytes_cold for part in parts for _, cost in region_costs(layer, part))
    assert plan.shared_s == max(min(tried), bytes_cold / server_spec(cores).memory_bytes_per_s)


def test_turns_take_what_one_step_of_both_parts_takes(layer):
    halves = (StepShape.of(16, 16, 128), StepShape.of(16, 16, 128))
    assert plan_shares(layer, halves, 4).in_turns_s == pytest.approx(seconds(layer, StepShape.of(32, 32, 128), 4))


def test_many_cores_that_a_few_could_feed_gain(layer):
    """One part computes while the other reads: what several instances on shares of the cores gain."""
    plan = plan_shares(layer, PARTS["decode 256 at 2048, halves"], 64)
    assert plan.ratio < 0.7 and sum(plan.cores) <= 64


def test_a_single_core_is_not_shared(layer):
    with pytest.raises(ValueError, match="2 branches have cube work, there are 1"):
        plan_shares(layer, PARTS["two prompts of 256"], 1)
