"""A whole service on hosts of its own, disturbed: every request gets its answer, to the token, and nothing is held."""

import asyncio
from contextlib import ExitStack
from random import Random

import pytest

from xllm_compile.benchmarks.bench_chaos import disturb, right_answers, start_service
from xllm_compile.benchmarks.chaos_faults import Fault, plan_faults
from xllm_compile.benchmarks.chaos_report import Outcome
from xllm_compile.benchmarks.etcd_process import ETCD, MISSING
from xllm_compile.benchmarks.host_network import missing_for_network

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(ETCD is None, reason=MISSING),
    pytest.mark.skipif(bool(missing_for_network()), reason=missing_for_network()),
]

# Six faults: an instance cut off from the gateways and from the others, killed and drained, a gateway and etcd killed.
SEED = 421
NUM_FAULTS = 6
IN_FLIGHT = 12


@pytest.fixture(scope="module")
def artifact(family_artifact):
    """float32: the same tokens whoever computes them."""
    return family_artifact("qwen3")


@pytest.fixture(scope="module")
def prompts(artifact):
    return right_answers(artifact, SEED)


@pytest.fixture
def start(artifact, tmp_path):
    with ExitStack() as stack:
        yield lambda instances: start_service(stack, artifact, tmp_path, instances, with_network=True)


def check(service, prompts, plan):
    tally, at_rest = asyncio.run(disturb(service, prompts, plan, seed=SEED, in_flight=IN_FLIGHT))
    outcome = Outcome.of(tally)
    assert [answer.result.error for answer in outcome.lost] == []
    assert outcome.wrong == [] and tally.num_unanswered == 0
    assert len(outcome.good) >= IN_FLIGHT
    assert {name: held for name, held in at_rest.items() if any(held.values())} == {}


def test_prefill_and_decode_through_faults_of_every_sort(start, prompts):
    service = start("MPD")
    plan = plan_faults(Random(SEED), 30, service.parts, with_network=True)
    assert len({fault.kind for fault in plan}) == NUM_FAULTS
    check(service, prompts, plan)


def test_an_instance_that_is_lost_one_way_or_both_comes_back_without_its_requests(start, prompts):
    """It has been given up for longer than a gateway waits, and still computes what others have taken over."""
    service = start("MM")
    sent = [("mix-0", gateway) for gateway in service.parts.gateways]
    received = [(gateway, "mix-0") for gateway in service.parts.gateways]
    plan = [
        Fault(kind="instance cut off", action="cut", targets=("mix-0",), pause_s=2.0, lasts_s=5.0, cuts=tuple(cuts))
        for cuts in (sent, received, [*sent, *received])
    ]
    check(service, prompts, plan)
