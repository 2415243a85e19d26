from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scheduler.policies.instances import decoding, instance
from xllm_compile.scheduler.cluster.state import Health, Pool, Role
from xllm_compile.scheduler.policies.roles import RoleRules, Roles, decide, least_decodes

P, D, PD, DP = Pool.PREFILL, Pool.DECODE, Pool.PREFILL_TO_DECODE, Pool.DECODE_TO_PREFILL
RULES = RoleRules(ttft_slo_s=1.0, tpot_slo_s=0.05)


def prefilling(name, num_tokens, pool=P, **values):
    return instance(name, pool, num_waiting=max(1, num_tokens // 1000), num_waiting_tokens=num_tokens, **values)


def in_pools(fleet, pools):
    return [replace(one, pool=pools.get(one.name, one.pool)) for one in fleet]


def test_without_need_nothing_changes():
    fleet = [prefilling("p1", 500), instance("p2", P), decoding("d1", 5), decoding("d2", 5)]
    after = decide(fleet, Roles(), RULES, 100.0)
    assert after.pools == {"p1": P, "p2": P, "d1": D, "d2": D}
    assert after.changed_s is None


def test_a_queue_of_prompts_takes_the_lightest_decode():
    fleet = [prefilling("p", 9000), decoding("d1", 9), decoding("d2", 2), decoding("d3", 5), decoding("d4", 5)]
    after = decide(fleet, Roles(), RULES, 100.0)
    # It would take as many as the queue asks for, and leaves the two that are kept.
    assert after.pools == {"p": P, "d1": D, "d2": DP, "d3": DP, "d4": D}
    assert (after.changed_s, after.to_prefill) == (100.0, True)


def test_live_ttft_above_its_target_takes_one_too():
    fleet = [prefilling("p", 500, ttft_s=1.2), decoding("d1", 1), decoding("d2", 2), decoding("d3", 3)]
    assert decide(fleet, Roles(), RULES, 0.0).pools["d1"] is DP
    # One long prompt that is being late alone is nothing that another instance could help with.
    fleet[0] = instance("p", P, ttft_s=1.2)
    assert decide(fleet, Roles(), RULES, 0.0).pools["d1"] is D


def test_decodes_that_have_no_slack_are_not_taken():
    full = [decoding(name, 30) for name in ("d1", "d2", "d3")]
    assert decide([prefilling("p", 9000), *full], Roles(), RULES, 0.0).pools == dict.fromkeys(("d1", "d2", "d3"), D) | {
        "p": P
    }


@pytest.mark.parametrize(
    "short",
    [
        [decoding("d1", 55), decoding("d2", 55)],
        [decoding("d1", 5, tpot_s=0.06), decoding("d2", 5, tpot_s=0.06)],
        [decoding("d1", 20, kv_tokens_total=10_000), decoding("d2", 20, kv_tokens_total=10_000)],
        [decoding("d1", 20, max_num_seqs=19), decoding("d2", 20, max_num_seqs=19)],
    ],
    ids=["predicted", "live", "kv", "seats"],
)
def test_decodes_that_are_short_of_something_take_the_lightest_prefill(short):
    fleet = [prefilling("p1", 2000), instance("p2", P), prefilling("p3", 1000), *short]
    pools = decide(fleet, Roles(), RULES, 0.0).pools
    assert pools["p2"] is PD
    assert pools["p1"] is P


def test_idle_prefill_gives_an_instance_away_after_a_while_if_that_helps():
    busy = [decoding("d1", 25), decoding("d2", 25)]
    fleet = [instance("p1", P), instance("p2", P), *busy]
    first = decide(fleet, Roles(), RULES, 0.0)
    assert first.changed_s is None
    assert decide(fleet, first, RULES, 9.0).changed_s is None
    later = decide(fleet, first, RULES, 10.0)
    assert sorted(later.pools.values()) == [D, D, P, PD]
    # The last prefill stays, and where decodes have nothing to do nobody is needed.
    assert decide(fleet[1:], first, RULES, 10.0).changed_s is None
    assert decide([instance("p1", P), instance("p2", P), decoding("d", 1)], first, RULES, 10.0).changed_s is None
    # Prompts in between start the time anew.
    waited = decide([prefilling("p1", 100), *fleet[1:]], first, RULES, 9.0)
    assert decide(fleet, waited, RULES, 10.0).changed_s is None


def test_what_is_still_changing_goes_back_first():
    fleet = [prefilling("p", 9000), decoding("d1", 1), decoding("d2", 5), decoding("d3", 9, pool=PD, num_running=12)]
    assert decide(fleet, Roles(), RULES, 0.0).pools["d3"] is DP
    short = [decoding("d1", 55), decoding("d2", 55), instance("p1", P), prefilling("x", 3000, DP, num_decoding=1)]
    assert decide(short, Roles(), RULES, 0.0).pools["x"] is PD


def test_in_between_it_does_both_until_the_old_work_is_done():
    still = prefilling("a", 100, PD), decoding("b", 1, pool=DP)
    done = decoding("c", 3, pool=PD), prefilling("d", 100, DP)
    pools = decide([*still, *done], Roles(), RULES, 0.0).pools
    assert pools == {"a": PD, "b": DP, "c": D, "d": P}
    for one in (*still, *done):
        assert one.takes_prefills is (one.pool is DP) and one.takes_decodes is (one.pool is PD)


def test_the_other_direction_waits():
    queue = [prefilling("p", 9000), *(decoding(f"d{n}", 2) for n in range(4))]
    after = decide(queue, Roles(), RULES, 100.0)
    short = [instance("p", P), *(decoding(f"d{n}", 60) for n in range(4))]
    assert decide(in_pools(short, after.pools), after, RULES, 104.0).changed_s == 100.0
    assert decide(in_pools(short, after.pools), after, RULES, 105.0).changed_s == 105.0
    # The same direction need not.
    more = [prefilling("p", 90_000), *(decoding(f"d{n}", 2) for n in range(6))]
    pools = after.pools | {"d4": D, "d5": D}
    again = decide(in_pools(more, pools), after, RULES, 100.5)
    assert again.changed_s == 100.5
    assert sum(pool is DP for pool in again.pools.values()) == 4


def test_a_stationary_load_is_left_alone():
    """Whatever is reported, again and again, settles: no back and forth."""
    for num_tokens in (0, 500, 3000, 30_000):
        for num_seqs in (1, 10, 20, 30, 60):
            fleet = [prefilling(f"p{n}", num_tokens) if num_tokens else instance(f"p{n}", P) for n in range(4)]
            fleet += [decoding(f"d{n}", num_seqs) for n in range(4)]
            roles, changes = Roles(), []
            for now in range(0, 300, 1):
                before = roles.pools
                roles = decide(in_pools(fleet, roles.pools), roles, RULES, float(now))
                changes += [now] if before and roles.pools != before else []
            assert len(changes) <= 6, (num_tokens, num_seqs, changes)
            assert not changes or changes[-1] < 60, (num_tokens, num_seqs, changes)


def test_only_instances_started_for_anything_change():
    fleet = [prefilling("p", 9000), decoding("d1", 1, role=Role.DECODE), decoding("d2", 5), decoding("d3", 5)]
    assert decide(fleet, Roles(), RULES, 0.0).pools["d1"] is D


def test_newcomers_join_the_pool_that_is_smaller_or_the_one_they_were_started_for():
    fleet = [instance(name) for name in "abcdef"] + [instance("x", role=Role.DECODE)]
    pools = decide(fleet, Roles(), RULES, 0.0).pools
    assert pools["x"] is D
    assert sorted(pools[name] for name in "abcdef") == [D] * 3 + [P] * 3
    assert decide([instance("a"), instance("b")], Roles(), RULES, 0.0).pools == {"a": P, "b": D}


def test_those_that_are_gone_are_nobodys_business():
    fleet = [instance("p", P), decoding("d1", 1), decoding("d2", 1, health=Health.SUSPECT)]
    assert "d2" not in decide(fleet, Roles(), RULES, 0.0).pools
    assert decide([], Roles(), RULES, 0.0).pools == {}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"ttft_slo_s": 0}, "ttft_slo_s=0 must be positive"),
        ({"spare_share": 0.95}, "spare_share=0.95 must be above 0 and below tpot_share=0.9"),
        ({"dwell_s": -1}, "dwell_s=-1 and"),
    ],
)
def test_bad_rules_are_refused(values, said):
    with pytest.raises(ValueError, match=said):
        RoleRules(**({"ttft_slo_s": 1.0, "tpot_slo_s": 0.05} | values))


loads = st.tuples(st.integers(0, 40_000), st.integers(0, 80), st.sampled_from([None, 0.01, 0.2]))


@given(rounds=st.lists(st.lists(loads, min_size=6, max_size=6), min_size=1, max_size=12), count=st.integers(2, 6))
@settings(max_examples=150)
def test_whatever_the_loads_both_pools_have_somebody_and_changes_go_through_the_middle(rounds, count):
    legal = {
        P: {P, PD},
        D: {D, DP},
        PD: {PD, D, DP},
        DP: {DP, P, PD},
        Pool.MIX: {P, D, PD, DP},
    }
    pools = {f"i{n}": Pool.MIX for n in range(count)}
    roles = Roles()
    for now, round_ in enumerate(rounds):
        fleet = [
            decoding(
                name,
                seqs,
                pool=pools[name],
                num_waiting=tokens // 1000,
                num_waiting_tokens=tokens,
                tpot_s=live,
                ttft_s=live and live * 10,
            )
            for (name, (tokens, seqs, live)) in zip(pools, round_, strict=False)
        ]
        roles = decide(fleet, roles, RULES, now * 3.0)
        assert roles.pools.keys() == pools.keys()
        assert all(after in legal[pools[name]] or after is _done(pools[name]) for name, after in roles.pools.items())
        pools = roles.pools
        decodes = sum(pool in (D, PD) for pool in pools.values())
        assert least_decodes(count) <= decodes < count


def _done(pool):
    return {PD: D, DP: P}.get(pool, pool)
