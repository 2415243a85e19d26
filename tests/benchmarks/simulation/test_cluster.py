import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.benchmarks.simulation.fixtures import hardware, requests
from xllm_compile.benchmarks.simulation.cluster import Cluster, ClusterRules, attainment
from xllm_compile.runtime.policies.order import POLICIES as ORDERS
from xllm_compile.runtime.policies.order import Order
from xllm_compile.scheduler.cluster.state import Pool
from xllm_compile.scheduler.policies.colocation import ColocationRules
from xllm_compile.scheduler.policies.roles import RoleRules
from xllm_compile.scheduler.policies.routing import POLICIES, RoutingRules

P, D, M = Pool.PREFILL, Pool.DECODE, Pool.MIX
COLOCATION = ColocationRules(tpot_slo_s=0.05)
ROLES = RoleRules(ttft_slo_s=1.0, tpot_slo_s=0.05)


def served(
    arrivals, pools=(P, D), policy="slo", roles=None, seed=0, device=None, colocation=None, order="deadline", **rules
):
    cluster = Cluster(
        hardware=device or hardware(),
        pools=pools,
        rules=ClusterRules(
            routing=RoutingRules(policy=policy, **rules), roles=roles, colocation=colocation, order=Order(order)
        ),
        seed=seed,
        checks=True,
    )
    cluster.run(arrivals)
    return cluster


def facts(arrivals):
    return [(one.prefill, one.decode, one.first_token_s, one.finished_s, one.is_refused) for one in arrivals]


@settings(max_examples=25)
@given(
    pools=st.lists(st.sampled_from([P, D, M]), min_size=1, max_size=5),
    policy=st.sampled_from(POLICIES),
    is_dynamic=st.booleans(),
    seed=st.integers(0, 5),
    rate=st.sampled_from([1.0, 10.0, 60.0]),
    kv_tokens=st.sampled_from([4000, 12_000, 100_000]),
    max_num_seqs=st.sampled_from([2, 64]),
    offline_share=st.sampled_from([0.0, 0.4]),
    is_colocated=st.booleans(),
    order=st.sampled_from(ORDERS),
)
def test_nothing_is_lost_nor_served_twice_and_all_is_repeatable(
    pools, policy, is_dynamic, seed, rate, kv_tokens, max_num_seqs, offline_share, is_colocated, order
):
    """checks: after every event the KV of every instance is what its sequences hold, and no more than there is."""
    device = hardware(kv_tokens=kv_tokens, max_num_seqs=max_num_seqs)
    colocation = COLOCATION if is_colocated else None
    runs = []
    for _ in range(2):
        arrivals = requests(60, rate, seed=seed, offline_share=offline_share)
        cluster = served(
            arrivals, pools, policy, ROLES if is_dynamic else None, seed, device, colocation, order, max_wait_s=10.0
        )
        runs.append(facts(arrivals))
        for one in arrivals:
            assert one.is_refused is (one.finished_s is None), "served or refused, never neither"
            if not one.is_refused:
                assert one.num_generated == one.num_output_tokens
                assert one.first_token_s is not None and one.finished_s is not None
                assert one.arrival_s < one.first_token_s <= one.finished_s
        for instance in cluster.instances.values():
            assert instance.kv_used == 0 and instance.num_decoding == 0 and instance.num_waiting_tokens == 0
            assert not instance.prefilling and not instance.arriving and not instance.paused
    assert runs[0] == runs[1]


def test_prompts_are_computed_by_prefills_and_handed_over():
    arrivals = requests(50, 2.0)
    cluster = served(arrivals, [P, P, D], "load")
    assert {one.prefill for one in arrivals} == {"i0000", "i0001"}
    assert {one.decode for one in arrivals} == {"i0002"}
    assert cluster.num_flips == 0 and cluster.timeline == [(0.0, 2, 1)]


def test_a_hand_over_takes_its_bytes_and_delays_the_second_token_only():
    slow, fast = requests(1, 1.0), requests(1, 1.0)
    for arrivals, link in ((slow, 1e6), (fast, 1e12)):
        (one,) = arrivals
        one.num_prompt_tokens, one.num_output_tokens = 500, 2
        device = hardware()
        cluster = Cluster(
            hardware=type(device)(
                profile=device.profile, kv_tokens=10_000, kv_bytes_per_token=1000, link_bytes_per_s=link
            ),
            pools=[P, D],
            rules=ClusterRules(routing=RoutingRules(policy="load")),
        )
        cluster.run(arrivals)
    assert slow[0].ttft_s == fast[0].ttft_s
    assert slow[0].tpot_s - fast[0].tpot_s == pytest.approx(501 * 1000 / 1e6, rel=1e-3)


def test_a_wave_of_prompts_moves_instances_there_and_a_wave_of_decodes_back():
    """Both directions change pools: instances are not stuck on either side."""
    arrivals = requests(500, 12.0)
    for one in arrivals[:250]:
        one.num_prompt_tokens, one.num_output_tokens = 3000, 2
    for one in arrivals[250:]:
        one.num_prompt_tokens, one.num_output_tokens = 300, 900
    cluster = served(arrivals, [P] * 3 + [D] * 3, "slo", ROLES)
    prefills = [count for time, count, _ in cluster.timeline if time < arrivals[250].arrival_s]
    assert max(prefills) == 4, "two decodes are kept"
    decodes = [count for time, _, count in cluster.timeline if time > arrivals[250].arrival_s]
    assert max(decodes) > 3


@pytest.mark.parametrize("seed", [1, 2])
def test_a_steady_load_turns_nobody_to_and_fro(seed):
    arrivals = requests(1500, 5.0, seed=seed)
    cluster = served(arrivals, [P] * 3 + [D] * 3, "slo", ROLES)
    # A burst may settle it otherwise, once.
    assert cluster.num_flips <= 1
    assert len(cluster.timeline) <= 2


def test_on_bursts_roles_and_slo_keep_more_targets_than_fixed_pools():
    def bursts():
        arrivals = requests(400, 120.0, seed=3)
        for one in arrivals:
            one.arrival_s += 15.0 * (one.number // 100)
            one.num_output_tokens = min(one.num_output_tokens, 30)
        return arrivals

    fixed, free = bursts(), bursts()
    served(fixed, [P] * 4 + [D] * 4, "load")
    served(free, [P] * 4 + [D] * 4, "slo", ROLES)
    assert attainment(free) > attainment(fixed) + 0.1


def test_under_overload_deadlines_keep_most_in_time_and_predictions_know_it():
    found = {}
    for order in ("fcfs", "deadline"):
        found[order] = requests(600, 16.0)
        for one in found[order]:
            one.num_output_tokens = min(one.num_output_tokens, 20)
        served(found[order], [M, M], "slo", order=order)
    assert attainment(found["fcfs"]) < 0.6 and attainment(found["deadline"]) > 0.8
    expected = [one for one in found["deadline"] if one.predicted_ttft_s <= 1.0]
    assert len(expected) > 0.7 * 600, "in-time requests are seen to pass the late ones"
    assert sum((one.ttft_s or 0.0) <= 1.0 for one in expected) > 0.95 * len(expected)


def test_late_requests_end_under_lasting_overload():
    """For two minutes twice as much comes as can be computed: late ones have their turns once they are a minute old."""
    arrivals = requests(3600, 30.0)
    for one in arrivals:
        one.num_output_tokens = min(one.num_output_tokens, 20)
    last_s = arrivals[-1].arrival_s
    served(arrivals, [M, M], "load", max_wait_s=1e9)
    late = [one for one in arrivals if (one.ttft_s or 0.0) > 60.0 and (one.first_token_s or last_s) < last_s]
    assert late, "some had their first token while in-time ones still came"
    assert attainment([one for one in arrivals if one.arrival_s > 70.0]) > 0.2, "and left the others time"


def test_offline_work_uses_what_is_left_and_online_work_does_not_notice():
    def mixed():
        arrivals = requests(500, 11.0, offline_share=0.5)
        for one in arrivals:
            one.num_output_tokens = 2 * one.num_output_tokens
        return arrivals

    plain, gives_way, alone = mixed(), mixed(), mixed()
    for one in plain:
        one.is_offline = False
    served(plain, [P, D], "slo", order="fcfs")
    cluster = served(gives_way, [P, D], "slo", colocation=COLOCATION, order="fcfs")
    served([one for one in alone if one.ttft_slo_s], [P, D], "slo", order="fcfs")
    assert attainment(gives_way) > attainment(plain) + 0.1
    assert attainment(gives_way) > attainment([one for one in alone if one.ttft_slo_s]) - 0.03
    moved = [one for one in gives_way if one.is_offline and one.decode != one.prefill]
    assert moved, "the decoding instance pulled some over"
    assert {one.decode for one in moved} == {"i0001"}
    assert cluster.now < 4 * gives_way[-1].arrival_s


def test_of_very_many_instances_some_are_looked_at_and_nobody_is_left_out():
    arrivals = requests(600, 200.0)
    cluster = served(arrivals, [P] * 40 + [D] * 60, "slo")
    assert all(one.finished_s for one in arrivals)
    assert attainment(arrivals) > 0.9
    assert sum(instance.busy_s > 0 for instance in cluster.instances.values()) > 80
