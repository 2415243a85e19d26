from typing import Any

import pytest

from tests.scheduler.policies.instances import instance, request
from xllm_compile.scheduler.cluster.state import CachedTokens, Health, Placement, Pool
from xllm_compile.scheduler.policies import predict
from xllm_compile.scheduler.policies.copy_times import CopyPrior, CopyTimes
from xllm_compile.scheduler.policies.fetch import Fetching, FetchRules
from xllm_compile.scheduler.policies.routing import RoutingRules, route

KV: dict[str, Any] = {"kv_bytes_per_token": 100_000, "transfers": ("tcp:here",)}
# A token is computed in 0.1 ms and copied in 0.01 ms.
FAST = CopyTimes(CopyPrior(latency_s=0.001, bytes_per_s=1e10))
SLOW = CopyTimes(CopyPrior(latency_s=0.001, bytes_per_s=1e8))
PROMPT = request(8000)
HAS_ALL = {"b": CachedTokens(device=6400)}


def fetching(others, cached, copies=FAST, rules=None, prompt=PROMPT):
    return Fetching(prompt, others, cached, copies, rules or FetchRules(), now=0.0)


def fetched(target, others, cached, **given):
    return fetching([target, *others], cached, **given).best(target, cached.get(target.name, CachedTokens()))


def test_what_another_has_is_copied_where_that_is_sooner_done():
    a, b = instance("a", **KV), instance("b", **KV)
    found = fetched(a, [b], HAS_ALL)
    assert (found.source, found.num_tokens) == ("b", 6400)
    without, there = (predict.ttft_s(a, PROMPT, CachedTokens(device=count)) for count in (0, 6400))
    assert found.spared_s == pytest.approx(without - there)
    assert found.copy_s == pytest.approx(0.001 + 0.064)
    assert fetched(a, [b], HAS_ALL, copies=SLOW) is None
    assert fetched(b, [a], HAS_ALL) is None


def test_only_what_is_missing_has_to_be_copied():
    a, b = instance("a", **KV), instance("b", **KV)
    found = fetched(a, [b], HAS_ALL | {"a": CachedTokens(device=3200, host=1600)})
    assert found.copy_s == pytest.approx(0.001 + 0.016)
    # A block's copy takes longer than the block.
    assert fetched(a, [b], HAS_ALL | {"a": CachedTokens(device=6384)}, copies=SLOW) is None


def test_the_last_token_is_computed():
    a, b = instance("a", **KV), instance("b", **KV)
    cached = {"b": CachedTokens(device=1600, host=1600)}
    assert fetched(a, [b], cached, prompt=request(3200)).num_tokens == 3184
    assert fetched(a, [b], cached, prompt=request(3201)).num_tokens == 3200


@pytest.mark.parametrize(
    "values",
    [
        {"health": Health.SUSPECT},
        {"weights_key": "x"},
        {"kv_layout": "x"},
        {"transfers": ()},
        {"kv_bytes_per_token": 0},
    ],
)
def test_who_cannot_send_is_not_asked(values):
    a, b, c = instance("a", **KV), instance("b", **(KV | values)), instance("c", **KV)
    assert fetched(a, [b], HAS_ALL) is None
    found = fetched(a, [b, c], HAS_ALL | {"c": CachedTokens(device=3200)})
    assert (found.source, found.num_tokens) == ("c", 3200)


@pytest.mark.parametrize("values", [{"transfers": ()}, {"profile": None}])
def test_a_target_that_takes_none_or_of_which_nothing_is_known(values):
    assert fetched(instance("a", **(KV | values)), [instance("b", **KV)], HAS_ALL) is None


def test_what_is_on_disk_is_not_sent_and_a_draining_instance_sends():
    a, b = instance("a", **KV), instance("b", is_draining=True, **KV)
    assert fetched(a, [b], {"b": CachedTokens(disk=6400)}) is None
    assert fetched(a, [b], HAS_ALL).source == "b"


def test_of_equal_prefixes_the_one_with_less_to_do_is_asked():
    a, b, c = instance("a", **KV), instance("b", num_running=3, **KV), instance("c", num_running=1, **KV)
    assert fetched(a, [b, c], HAS_ALL | {"c": CachedTokens(device=6400)}).source == "c"


def test_a_busy_holder_gives_a_copy_to_an_idle_instance():
    fleet = [instance("a", **KV), instance("b", num_waiting=9, num_waiting_tokens=50_000, **KV)]
    rules = RoutingRules(policy="prefix")
    found = route(PROMPT, fleet, rules=rules, cached=HAS_ALL, fetching=fetching(fleet, HAS_ALL))
    assert isinstance(found, Placement) and found.fetch is not None
    assert (found.prefill, found.fetch.source, found.num_cached_tokens) == ("a", "b", 6400)
    spared = predict.ttft_s(fleet[0], PROMPT, CachedTokens(device=6400))
    assert found.ttft_s == pytest.approx(spared + found.fetch.copy_s)
    for without in (
        route(PROMPT, fleet, rules=rules, cached=HAS_ALL, fetching=fetching(fleet, HAS_ALL, copies=SLOW)),
        route(PROMPT, fleet, rules=rules, cached=HAS_ALL),
    ):
        assert isinstance(without, Placement) and without.fetch is None


def test_an_idle_holder_computes_what_is_left_itself():
    fleet = [instance("a", **KV), instance("b", **KV)]
    found = route(PROMPT, fleet, rules=RoutingRules(policy="prefix"), cached=HAS_ALL, fetching=fetching(fleet, HAS_ALL))
    assert isinstance(found, Placement) and (found.prefill, found.fetch) == ("b", None)


def test_a_prefilling_instance_fetches_for_one_that_decodes():
    fleet = [
        instance("p", Pool.PREFILL, **KV),
        instance("b", Pool.PREFILL, num_waiting=9, num_waiting_tokens=50_000, **KV),
    ]
    fleet.append(instance("d", Pool.DECODE, **KV))
    found = route(PROMPT, fleet, rules=RoutingRules(), cached=HAS_ALL, fetching=fetching(fleet, HAS_ALL))
    assert isinstance(found, Placement) and found.fetch is not None
    assert (found.prefill, found.decode, found.fetch.source) == ("p", "d", "b")


def test_bad_rules_are_refused():
    with pytest.raises(ValueError, match=r"margin=0 must be in \(0, 1\]"):
        FetchRules(margin=0)


def test_a_copy_is_waited_for_as_long_as_computing_takes():
    found = fetched(instance("a", **KV), [instance("b", **KV)], HAS_ALL)
    assert FetchRules(least_wait_s=0).wait_s(found) == found.spared_s
    assert FetchRules(least_wait_s=60).wait_s(found) == 60
