"""The simulated instance against the real scheduler on the same requests, and what must hold in it."""

import pytest

from tests.benchmarks.simulation.fixtures import PROFILE, hardware, requests
from xllm_compile.benchmarks.schedule_simulation import SimulatedEngine, SimulatedSequence
from xllm_compile.benchmarks.simulation.cluster import Cluster, ClusterRules
from xllm_compile.benchmarks.simulation.hardware import Hardware
from xllm_compile.benchmarks.simulation.requests import SimRequest
from xllm_compile.benchmarks.timing import percentile
from xllm_compile.runtime.local_scheduler import SchedulingRules
from xllm_compile.runtime.policies.state import Limits
from xllm_compile.runtime.step_predictor import StepPrior
from xllm_compile.scheduler.cluster.state import Pool
from xllm_compile.scheduler.policies.routing import RoutingRules


def served_by_the_real_scheduler(arrivals: list[SimRequest], device: Hardware) -> tuple[list[float], list[float]]:
    """TTFT and TPOT of each request."""
    engine = SimulatedEngine(
        rules=SchedulingRules(),
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
        )
        for one in arrivals
    ]
    engine.run(sequences)
    return [one.ttft_s for one in sequences], [one.tpot_s or 0.0 for one in sequences]


@pytest.mark.parametrize(("rate", "tpot_slo_s"), [(2.0, 0.05), (5.0, 0.05), (7.0, 0.05), (5.0, 0.2)])
def test_it_serves_as_the_real_scheduler_does(rate, tpot_slo_s):
    device, arrivals = hardware(is_async=False), requests(400, rate, tpot_slo_s=tpot_slo_s)
    ttfts, tpots = served_by_the_real_scheduler(arrivals, device)
    rules = ClusterRules(routing=RoutingRules(policy="load"), truth_factor=1.0)
    Cluster(hardware=device, pools=[Pool.MIX], rules=rules).run(arrivals)
    for q in (50, 90):
        assert percentile([one.ttft_s or 0.0 for one in arrivals], q) == pytest.approx(percentile(ttfts, q), rel=0.1)
        assert percentile([one.tpot_s for one in arrivals], q) == pytest.approx(percentile(tpots, q), rel=0.1)
