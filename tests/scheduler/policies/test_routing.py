import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scheduler.policies.instances import decoding, instance, placed, request
from xllm_compile.scheduler.cluster.state import CachedTokens, Health, Placement, Pool, Refusal, Role
from xllm_compile.scheduler.policies import predict
from xllm_compile.scheduler.policies.placements import Placements
from xllm_compile.scheduler.policies.routing import POLICIES, RoutingRules, route, shortlist

P, D = Pool.PREFILL, Pool.DECODE


def rules(policy="slo", **values):
    return RoutingRules(policy=policy, **values)


def test_round_robin_takes_prefills_and_decodes_in_turns():
    fleet = [instance("p1", P), instance("d1", D), instance("p2", P), instance("d2", D), instance("d3", D)]
    found = [placed(route(request(), fleet, rules=rules("round_robin"), turn=turn)) for turn in range(6)]
    assert [prefill for prefill, _ in found] == ["p1", "p2"] * 3
    assert [decode for _, decode in found] == ["d1", "d2", "d3"] * 2


def test_load_takes_the_shortest_queue_and_the_emptiest_cache():
    fleet = [
        instance("p1", P, num_waiting=1, num_waiting_tokens=100),
        instance("p2", P, num_waiting=9, num_waiting_tokens=90),
        decoding("d1", 9),
        decoding("d2", 8),
    ]
    assert placed(route(request(), fleet, rules=rules("load"))) == ("p2", "d2")


@pytest.mark.parametrize("policy", POLICIES)
def test_instances_that_do_both_keep_their_requests(policy):
    fleet = [instance(name) for name in "abc"]
    for turn in range(6):
        prefill, decode = placed(route(request(), fleet, rules=rules(policy), turn=turn))
        assert prefill == decode


@pytest.mark.parametrize("policy", POLICIES)
def test_equals_are_taken_in_turns(policy):
    fleet = [instance(name) for name in "abc"]
    found = [placed(route(request(), fleet, rules=rules(policy), turn=turn))[0] for turn in range(6)]
    assert sorted(found) == list("aabbcc")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("pools", [(Pool.MIX, Pool.MIX), (P, D)])
def test_suspect_and_draining_instances_and_encoders_get_nothing(policy, pools):
    fleet = [
        instance("suspect", pools[0], health=Health.SUSPECT),
        instance("draining", pools[1], is_draining=True),
        instance("encoder", pools[0], role=Role.ENCODE),
        instance("lost", pools[1], health=Health.LEASE_LOST, num_waiting=5, num_waiting_tokens=5000),
    ]
    for turn in range(4):
        assert placed(route(request(), fleet, rules=rules(policy), turn=turn)) == ("lost", "lost")
    found = route(request(), fleet[:3], rules=rules(policy))
    assert isinstance(found, Refusal)
    assert found.retry_after_s == 1.0
    assert found.reason == "none of 3 instances takes work now; retry later"


@pytest.mark.parametrize("policy", POLICIES)
def test_a_long_request_goes_only_where_it_fits(policy):
    fleet = [
        instance("short", max_model_len=4096),
        instance("small", kv_tokens_total=4000),
        instance("long", num_waiting=3, num_waiting_tokens=3000),
    ]
    for turn in range(3):
        assert placed(route(request(4000), fleet, rules=rules(policy), turn=turn)) == ("long", "long")
    found = route(request(40_000), fleet, rules=rules(policy))
    assert isinstance(found, Refusal)
    assert found.retry_after_s is None
    assert "40000 prompt tokens and 256 to generate: 40256" in found.reason
    assert "max_model_len=32768" in found.reason


def test_kv_is_handed_over_only_between_equals():
    fleet = [instance("p", P), instance("d1", D, kv_layout="other"), decoding("d2", 30)]
    assert placed(route(request(), fleet, rules=rules())) == ("p", "d2")
    assert placed(route(request(), fleet[:2], rules=rules())) == ("p", "p")


@pytest.mark.parametrize("policy", POLICIES)
def test_one_pool_alone_does_all(policy):
    assert placed(route(request(), [instance("p", P)], rules=rules(policy))) == ("p", "p")
    assert placed(route(request(), [instance("d", D)], rules=rules(policy))) == ("d", "d")


def test_new_pools_of_changing_instances_take_the_work():
    fleet = [instance("a", Pool.PREFILL_TO_DECODE), instance("b", Pool.DECODE_TO_PREFILL)]
    assert placed(route(request(), fleet, rules=rules())) == ("b", "a")


# Prefix


def test_part_of_a_prefix_counts_for_what_it_spares():
    """Not only whole matches, as with integer division."""
    fleet = [instance("a"), instance("b"), instance("c")]
    cached = {"b": CachedTokens(device=300), "c": CachedTokens(disk=400)}
    for turn in range(3):
        found = route(request(1000), fleet, rules=rules("prefix"), cached=cached, turn=turn)
        assert placed(found) == ("b", "b")
        assert isinstance(found, Placement) and found.num_cached_tokens == 300


def test_a_queue_longer_than_the_prefix_spares_sends_it_elsewhere():
    cached = {"a": CachedTokens(device=800)}
    for num_waiting_tokens, where in ((700, "a"), (900, "b")):
        fleet = [instance("a", num_waiting=1, num_waiting_tokens=num_waiting_tokens), instance("b")]
        assert placed(route(request(1000), fleet, rules=rules("prefix"), cached=cached))[0] == where


@pytest.mark.parametrize("policy", ["prefix", "slo"])
def test_a_popular_prefix_spreads_instead_of_drowning_one_instance(policy):
    """Everybody has the prefix of one instance, a burst of them, before any report: no death spiral."""
    fleet, placements = [instance(name) for name in "abcd"], Placements()
    cached = {"a": CachedTokens(device=900)}
    counts = dict.fromkeys("abcd", 0)
    for turn in range(100):
        shape = request(1000, max_output_tokens=1)
        found = route(shape, placements.added(fleet, 1.0), rules=rules(policy), cached=cached, turn=turn)
        assert isinstance(found, Placement)
        placements.place(str(turn), shape, found, 1.0)
        counts[found.prefill] += 1
    assert counts["a"] == max(counts.values()), "the prefix still counts"
    assert counts["a"] < 80 and min(counts.values()) > 3
    waits = [predict.ttft_s(one, request(1000)) for one in placements.added(fleet, 1.0)]
    # Nobody waits longer than another by more than the prefix spares, 0.1 s, or one prompt.
    assert max(waits) - min(waits) < 0.25


def test_sessions_come_back_to_their_instance_while_the_load_is_even():
    """Affinity survives small differences in load: hit rates do not fall apart."""
    rng, hits = random.Random(7), 0
    has: dict[int, str] = {}
    for turn in range(400):
        session = rng.randrange(40)
        fleet = [instance(name, num_waiting=1, num_waiting_tokens=rng.randrange(300)) for name in "abcd"]
        cached = {has[session]: CachedTokens(device=900)} if session in has else {}
        where, _ = placed(route(request(1000), fleet, rules=rules("prefix"), cached=cached, turn=turn))
        hits += has.get(session) == where
        has[session] = where
    assert hits == 400 - 40


# SLO


def slo(num_prompt_tokens=1000, **values):
    return request(num_prompt_tokens, **({"ttft_slo_s": 1.0, "tpot_slo_s": 0.05} | values))


def test_the_decode_with_the_best_interval_is_taken_not_the_first_that_keeps_the_target():
    fleet = [instance("p", P), decoding("d1", 20), decoding("d2", 5), decoding("d3", 19)]
    for turn in range(4):
        assert placed(route(slo(), fleet, rules=rules(), turn=turn)) == ("p", "d2")


def test_a_few_tokens_are_prefilled_where_they_are_decoded():
    fleet = [instance("p", P), decoding("d1", 20), decoding("d2", 5)]
    assert placed(route(slo(200), fleet, rules=rules())) == ("d2", "d2")
    assert placed(route(request(200), fleet, rules=rules())) == ("p", "d2"), "without a target sooner is better"
    assert placed(route(slo(200), fleet, rules=rules(local_prefill_tokens=0))) == ("p", "d2")
    cached = {"d1": CachedTokens(device=900)}
    assert placed(route(slo(1000), fleet, rules=rules(), cached=cached)) == ("d1", "d1")
    busy = [instance("p", P), decoding("d1", 400, max_num_seqs=512, kv_tokens_total=10**6)]
    assert placed(route(slo(200), busy, rules=rules())) == ("p", "d1"), "its TPOT would suffer"


def test_prefills_that_would_be_late_spill_to_decodes_with_slack():
    fleet = [instance("p", P, num_waiting=20, num_waiting_tokens=20_000, num_running=1), decoding("d", 5)]
    assert placed(route(slo(1500), fleet, rules=rules())) == ("d", "d")
    assert placed(route(slo(1500, ttft_slo_s=10.0), fleet, rules=rules())) == ("p", "d")
    full = [fleet[0], decoding("d", 400, max_num_seqs=512, kv_tokens_total=10**6)]
    assert placed(route(slo(1500), full, rules=rules())) == ("p", "d"), "no slack there"


def test_prefill_spills_before_it_is_late_where_that_is_sooner():
    fleet = [instance("p", P, num_waiting=8, num_waiting_tokens=8000, num_running=1), decoding("d", 5)]
    # About 1 s there; 0.2 s where five decode.
    assert placed(route(slo(1000, ttft_slo_s=3.0), fleet, rules=rules())) == ("d", "d")
    assert placed(route(slo(1000, ttft_slo_s=3.0), fleet, rules=rules(spill_share=0.5))) == ("p", "d")
    assert placed(route(slo(1000, ttft_slo_s=5.0), fleet, rules=rules())) == ("p", "d"), "not long"
    busy = [fleet[0], decoding("d", 5, num_waiting=9, num_waiting_tokens=9000)]
    assert placed(route(slo(1000, ttft_slo_s=3.0), busy, rules=rules())) == ("p", "d"), "later there"


def test_instances_that_do_both_and_keep_the_targets_come_first():
    fleet = [
        decoding("full", 350, pool=Pool.MIX, max_num_seqs=512, kv_tokens_total=10**6),
        instance("late", num_waiting=9, num_waiting_tokens=9000, num_running=1),
        decoding("fine", 20, pool=Pool.MIX),
    ]
    assert placed(route(slo(), fleet, rules=rules())) == ("fine", "fine")


def test_predictions_that_were_too_good_are_corrected():
    fleet = [instance("a", P, ttft_ratio=3.0), instance("b", P), instance("d", D)]
    found = [route(slo(), fleet, rules=rules(), turn=turn) for turn in range(3)]
    assert {placed(one)[0] for one in found} == {"b"}
    only = route(slo(), [fleet[0], fleet[2]], rules=rules())
    assert isinstance(only, Placement)
    assert only.ttft_s == pytest.approx(predict.ttft_s(instance("a"), slo())), "recorded without the correction"


def test_offline_requests_go_to_one_relaxed_instance_as_a_whole():
    fleet = [
        instance("p1", P, num_waiting=2, num_waiting_tokens=2000),
        instance("p2", P),
        instance("d", D),
    ]
    assert placed(route(request(is_offline=True), fleet, rules=rules())) == ("p2", "p2")
    fleet[1] = instance("p2", P, num_waiting=20, num_waiting_tokens=20_000)
    assert placed(route(request(is_offline=True), fleet, rules=rules())) == ("p1", "p1")


def test_with_colocation_offline_requests_go_to_decoding_instances_too():
    idle, busy = instance("d", D), decoding("e", 40)
    shape = request(is_offline=True)
    spreading = rules(spreads_offline=True)
    queue = instance("p", P, num_waiting=10, num_waiting_tokens=10_000)
    assert placed(route(shape, [queue, busy, idle], rules=spreading)) == ("d", "d")
    # Where prompts are computed soon they are computed there: it costs nobody's tokens.
    assert placed(route(shape, [instance("p", P), idle], rules=spreading)) == ("p", "p")


def test_who_would_wait_too_long_is_told_when_to_come_back():
    fleet = [
        instance("p", P, num_waiting=300, num_waiting_tokens=300_000, num_running=1, kv_tokens_total=10**6),
        decoding("d", 400, max_num_seqs=512, kv_tokens_total=10**6),
    ]
    wait_s = predict.ttft_s(fleet[0], request(1000))
    assert placed(route(request(1000), fleet, rules=rules(max_wait_s=40.0))) == ("p", "d")
    found = route(request(1000), fleet, rules=rules(max_wait_s=20.0))
    assert isinstance(found, Refusal)
    assert found.retry_after_s == pytest.approx(wait_s - 20.0)
    assert found.reason == f"the first token would take {wait_s:.1f} s, the limit is 20.0 s; retry later"
    offline = route(request(1000, is_offline=True), fleet, rules=rules(max_wait_s=40.0))
    assert isinstance(offline, Refusal) and "the limit is 20.0 s for offline requests" in offline.reason
    # One that has to go on elsewhere is not sent away.
    assert placed(route(request(1000, is_begun=True), fleet, rules=rules(max_wait_s=20.0))) == ("p", "d")
    # A longer target raises the limit.
    assert isinstance(route(request(1000, ttft_slo_s=60.0), fleet, rules=rules(max_wait_s=20.0)), Placement)
    # However long an idle instance would compute, it takes the request.
    assert placed(route(request(30_000), [instance("a")], rules=rules(max_wait_s=0.001))) == ("a", "a")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"policy": "best"}, "policy='best' must be one of round_robin, load, prefix, slo"),
        ({"max_wait_s": 0}, "max_wait_s=0 must be positive"),
        ({"local_prefill_tokens": -1}, "local_prefill_tokens=-1 at least 0"),
        ({"tpot_margin": 0}, "tpot_margin=0 must be above 0"),
        ({"spill_share": 1.5}, "spill_share=1.5 must be above 0 and at most 1"),
    ],
)
def test_bad_rules_are_refused(values, said):
    with pytest.raises(ValueError, match=said):
        RoutingRules(**values)


fleets = st.lists(
    st.builds(
        lambda pool, health, draining, waiting, seqs, length: (
            replace(
                decoding("x", seqs, pool=pool, max_model_len=length),
                health=health,
            )
            if not draining
            else instance("x", pool, is_draining=True, num_waiting=waiting, num_waiting_tokens=waiting * 700)
        ),
        st.sampled_from(Pool),
        st.sampled_from(Health),
        st.booleans(),
        st.integers(0, 50),
        st.integers(0, 100),
        st.sampled_from([512, 4096, 32_768]),
    ),
    max_size=8,
).map(lambda fleet: [replace(one, info=replace(one.info, name=f"i{n}")) for n, one in enumerate(fleet)])


@given(
    fleet=fleets,
    policy=st.sampled_from(POLICIES),
    length=st.integers(1, 8000),
    offline=st.booleans(),
    target=st.sampled_from([None, 0.05, 5.0]),
    turn=st.integers(0, 100),
)
@settings(max_examples=300)
def test_whatever_the_fleet_the_choice_is_allowed_and_repeatable(fleet, policy, length, offline, target, turn):
    shape = request(length, is_offline=offline, ttft_slo_s=target, tpot_slo_s=target)
    found = route(shape, fleet, rules=rules(policy), turn=turn)
    assert found == route(shape, fleet, rules=rules(policy), turn=turn)
    able = {one.name: one for one in fleet if one.takes_work and length + 256 <= one.info.max_model_len}
    if isinstance(found, Refusal):
        assert not able or found.retry_after_s is not None
        return
    assert found.prefill in able and found.decode in able
    if found.prefill != found.decode:
        assert able[found.decode].takes_decodes or not any(one.takes_decodes for one in able.values())


def test_of_very_many_instances_some_of_each_pool_and_the_prefixes_are_looked_at():
    pools = {P: [f"p{n}" for n in range(500)], D: [f"d{n}" for n in range(500)], Pool.MIX: ["m"]}
    cached = {f"p{n}": CachedTokens(device=n) for n in range(100)}
    names = shortlist(pools, cached, 8, random.Random(1).randrange)
    assert names[:8] == [f"p{n}" for n in range(99, 91, -1)]
    assert "m" in names and len(names) <= 25
    assert sum(name.startswith("d") for name in names) > 4
    assert len(set(names)) == len(names)
