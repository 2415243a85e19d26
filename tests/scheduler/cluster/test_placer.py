"""Placement among very many instances, of plain data."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from tests.scheduler.policies.instances import decoding, instance, request
from xllm_compile.scheduler.cluster.placer import Placer
from xllm_compile.scheduler.cluster.state import CachedTokens, Health, Pool
from xllm_compile.scheduler.errors import ApiError
from xllm_compile.scheduler.policies.routing import RoutingRules

MANY = 400


class PlainFleet:
    """Counts who is looked at."""

    def __init__(self, instances):
        self.instances = {each.name: each for each in instances}
        self.num_looked_at = 0

    def usable(self):
        pools: dict[Pool, list[str]] = {}
        for each in self.instances.values():
            if each.takes_work:
                pools.setdefault(each.pool, []).append(each.name)
        return pools

    def find(self, name):
        self.num_looked_at += 1
        return self.instances.get(name)


def placer(clock=lambda: 10.0, **rules):
    return Placer(RoutingRules(**rules), clock=clock, pick=random.Random(1).randrange)


def fleet_of(num, make=instance, **values):
    return PlainFleet(make(f"i{n}", **values) for n in range(num))


def test_few_are_all_looked_at():
    fleet = fleet_of(64)
    fleet.instances["i63"] = decoding("i63", 0, pool=Pool.MIX)
    busy = {name: decoding(name, 200, pool=Pool.MIX) for name in list(fleet.instances)[:-1]}
    fleet.instances |= busy
    assert placer().place("r", request(), fleet).prefill == "i63"


def test_of_very_many_few_are_looked_at_and_the_load_spreads():
    """Reports stay as they are: without counting what was placed since, and without chance, all would meet."""
    fleet, place = fleet_of(MANY), placer().place
    placed = Counter(place(str(number), request(), fleet).prefill for number in range(5 * MANY))
    assert fleet.num_looked_at <= 8 * 5 * MANY
    # 5 each on average; of one drawn at random the most loaded would have 13 or so.
    assert max(placed.values()) <= 8 and len(placed) > 0.95 * MANY


def test_the_only_one_that_takes_work_is_found():
    fleet = fleet_of(MANY, health=Health.SUSPECT)
    fleet.instances["i7"] = instance("i7", Pool.DECODE)
    for number in range(20):
        assert placer().place(str(number), request(), fleet).prefill == "i7"


def test_the_only_one_that_is_long_enough_is_found():
    fleet = fleet_of(MANY, max_model_len=512)
    fleet.instances["i7"] = instance("i7")
    assert placer().place("r", request(4000), fleet).prefill == "i7"
    with pytest.raises(ApiError) as error:
        placer().place("r", request(40_000), fleet)
    assert error.value.code == "context_length_exceeded"


def test_a_prefix_is_found_wherever_it_is():
    fleet = fleet_of(MANY)
    cached = {"i9": CachedTokens(device=8000), "gone": CachedTokens(device=8000)}
    assert placer().place("r", request(8100), fleet, cached).prefill == "i9"
    # One that takes no work is no candidate, whatever it has.
    fleet.instances["i9"] = replace(fleet.instances["i9"], health=Health.SUSPECT)
    assert placer().place("r", request(8100), fleet, cached).prefill != "i9"


def test_a_prefix_that_all_ask_for_does_not_draw_all_to_one():
    fleet, place = fleet_of(MANY), placer().place
    cached = {"i9": CachedTokens(device=8000)}
    placed = Counter(place(str(number), request(8100), fleet, cached).prefill for number in range(MANY))
    assert 1 < placed["i9"] < MANY / 4


def test_where_all_are_too_busy_a_refusal_costs_no_more_than_a_placement():
    fleet = fleet_of(MANY, num_waiting=100, num_waiting_tokens=2_000_000, num_running=1)
    for number in range(100):
        with pytest.raises(ApiError) as error:
            placer().place(str(number), request(), fleet)
        assert error.value.retry_after_s
    assert fleet.num_looked_at <= 100 * 8


def test_those_that_refused_are_not_asked_again_and_those_lost_last():
    fleet = fleet_of(2)
    fleet.instances = {
        name: replace(each, info=replace(each.info, incarnation=name)) for name, each in fleet.instances.items()
    }
    assert placer().place("r", request(), fleet, refused=["i0"]).prefill == "i1"
    assert placer().place("r", request(), fleet, lost=["i0"]).prefill == "i1"
    assert placer().place("r", request(), fleet, refused=["i0"], lost=["i1"]).prefill == "i1"
    assert placer().place("r", request(), fleet, refused=["i0", "i1"]) is None


@pytest.mark.parametrize("is_offline", [False, True])
def test_who_was_slow_is_avoided_unless_it_kept_offline_work_waiting(is_offline):
    now = 10.0
    told, fleet = placer(lambda: now), fleet_of(2)
    slow = told.place("slow", request(is_offline=is_offline), fleet).prefill
    now += 1000.0
    told.first_token("slow")
    told.finished("slow")
    chosen = []
    for number in range(4):
        chosen.append(told.place(str(number), request(), fleet).prefill)
        told.finished(str(number))
    assert (slow in chosen) == is_offline
