"""The simulated instance against the real scheduler on the same requests, and what must hold in it."""

import math

import pytest

from tests.benchmarks.simulation.fixtures import PROFILE, hardware, requests
from xllm_compile.benchmarks.schedule_simulation import SimulatedEngine, SimulatedSequence
from xllm_compile.benchmarks.simulation.cluster import Cluster, ClusterRules
from xllm_compile.benchmarks.simulation.hardware import Hardware
from xllm_compile.benchmarks.simulation.instance import SimInstance
from xllm_compile.benchmarks.simulation.requests import SimRequest
from xllm_compile.benchmarks.timing import percentile
from xllm_compile.runtime.local_scheduler import SchedulingRules
from xllm_compile.runtime.policies.offline import OfflineRules
from xllm_compile.runtime.policies.order import Order, PolicyName
from xllm_compile.runtime.policies.state import Limits
from xllm_compile.runtime.step_predictor import StepPrior
from xllm_compile.scheduler.cluster.state import Pool
from xllm_compile.scheduler.policies.colocation import ColocationRules
from xllm_compile.scheduler.policies.routing import RoutingRules


def served_by_the_real_scheduler(
    arrivals: list[SimRequest], device: Hardware, policy: PolicyName = "fcfs"
) -> list[SimulatedSequence]:
    engine = SimulatedEngine(
        rules=SchedulingRules(order=Order(policy), offline=OfflineRules.within(0.05)),
        limits=Limits(max_num_seqs=device.max_num_seqs, max_num_batched_tokens=device.max_num_batched_tokens),
        num_kv_tokens=device.kv_tokens,
        prior=StepPrior(
            by_tokens=PROFILE._by_tokens,
            token_s=6e-5,
            sequence_s=PROFILE.sequence_s,
            key_s=PROFILE.key_s,
            pair_s=PROFILE.pair_s,
        ),
        truth=PROFILE.step_s,
        starvation_s=math.inf,
    )
    sequences = [
        SimulatedSequence(
            number=one.number,
            kind="",
            arrival_s=one.arrival_s,
            num_prompt_tokens=one.num_prompt_tokens,
            num_outputs_wanted=one.num_output_tokens,
            max_tokens=2048,
            ttft_slo_s=one.ttft_slo_s,
            tpot_slo_s=one.tpot_slo_s,
            is_offline=one.is_offline,
        )
        for one in arrivals
    ]
    engine.run(sequences)
    return sequences


def is_close(found: list[float], expected: list[float]) -> bool:
    """Median and the ninth decile, within a tenth."""
    return all(percentile(found, q) == pytest.approx(percentile(expected, q), rel=0.1) for q in (50, 90))


@pytest.mark.parametrize("policy", ["fcfs", "deadline"])
@pytest.mark.parametrize(("rate", "tpot_slo_s"), [(2.0, 0.05), (5.0, 0.05), (7.0, 0.05), (5.0, 0.2)])
def test_it_serves_as_the_real_scheduler_does(policy, rate, tpot_slo_s):
    device, arrivals = hardware(is_async=False), requests(400, rate, tpot_slo_s=tpot_slo_s)
    real = served_by_the_real_scheduler(arrivals, device, policy)
    rules = ClusterRules(routing=RoutingRules(policy="load"), truth_factor=1.0, order=Order(policy))
    Cluster(hardware=device, pools=[Pool.MIX], rules=rules).run(arrivals)
    assert is_close([one.ttft_s or 0.0 for one in arrivals], [one.ttft_s for one in real])
    assert is_close([one.tpot_s for one in arrivals], [one.tpot_s or 0.0 for one in real])


@pytest.mark.parametrize("rate", [5.0, 8.0])
def test_offline_sequences_get_what_the_real_scheduler_leaves_them(rate):
    device, arrivals = hardware(is_async=False), requests(400, rate, offline_share=0.5)
    real = served_by_the_real_scheduler(arrivals, device)
    colocation = ColocationRules(tpot_slo_s=0.05)
    rules = ClusterRules(routing=RoutingRules(policy="load"), colocation=colocation, truth_factor=1.0)
    Cluster(hardware=device, pools=[Pool.MIX], rules=rules).run(arrivals)
    for is_offline in (False, True):
        pairs = [pair for pair in zip(arrivals, real, strict=True) if pair[0].is_offline == is_offline]
        assert is_close([one.ttft_s or 0.0 for one, _ in pairs], [one.ttft_s for _, one in pairs])
        assert is_close([one.tpot_s for one, _ in pairs], [one.tpot_s or 0.0 for _, one in pairs])


def test_prompts_keep_the_target_of_who_is_awaited():
    device = hardware(is_async=False)
    instance = SimInstance("d", device, PROFILE, "seed")
    awaited, prompt = requests(2, 1.0, longest=1)
    prompt.num_prompt_tokens, prompt.decode, awaited.tpot_slo_s = 1000, "d", 0.06
    awaited.max_output_tokens = 2
    instance.reserve(awaited, 0.0)
    instance.enqueue(prompt, 0.0)
    instance.plan(0.0)
    assert instance.granted() == [awaited]
    # A step of all of it takes 70 ms; with one token to come the one awaited needs steps of a third of its target.
    now = instance.end_s or 0.0
    assert now == pytest.approx(0.018, rel=0.2)
    instance.finish(now)
    awaited.num_generated = awaited.num_computed = 1
    awaited.num_computed += awaited.num_prompt_tokens
    instance.hand_in(awaited, now)
    instance.plan(now)
    assert (instance.online.members(), instance.awaited) == ([awaited], {})


@pytest.mark.parametrize(("arrival_s", "is_in_the_next"), [(0.030, True), (0.055, True), (0.068, False)])
def test_a_prompt_rides_in_the_next_step_unless_that_is_planned_already(arrival_s, is_in_the_next):
    instance = SimInstance("p", hardware(), PROFILE, "seed")
    long, short = requests(2, 1.0, longest=1)
    long.num_prompt_tokens, short.num_prompt_tokens = 2000, 10
    instance.enqueue(long, 0.0)
    # A step of 1024 tokens takes 70 ms, and the next one is planned 12 ms before its end.
    end_s = instance.plan(0.0)
    assert end_s is not None and end_s == pytest.approx(0.07, rel=0.1)
    instance.enqueue(short, arrival_s)
    instance.plan(arrival_s)
    instance.finish(end_s)
    next_end_s = instance.plan(end_s)
    assert next_end_s is not None
    instance.finish(next_end_s)
    assert (short.first_token_s is not None) == is_in_the_next


@pytest.mark.parametrize(("after_s", "num_steps"), [(0.002, 3), (0.009, 4)])
def test_decode_steps_end_for_who_comes_with_the_one_that_was_planned_last(after_s, num_steps):
    instance = SimInstance("d", hardware(), PROFILE, "seed")
    decode, short = requests(2, 1.0, longest=1)
    decode.num_output_tokens, decode.decode = 100, "d"
    decode.num_generated, decode.num_computed = 1, decode.num_prompt_tokens + 1
    instance.hand_in(decode, 0.0)
    whole_s = instance.plan(0.0)
    assert whole_s is not None
    step_s = whole_s / 99
    # In the third of 99 steps of 10 ms, of which the next one is planned 6 ms before their end.
    now = 2 * step_s + after_s
    instance.enqueue(short, now)
    assert instance.plan(now) == pytest.approx(num_steps * step_s, rel=0.01)
