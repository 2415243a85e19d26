"""A gateway has instances fetch prefixes from others, by real gRPC: what goes wrong costs computing, and no more."""

import asyncio

import pytest

from tests.scheduler.cluster.test_cached_prefixes import PREFIX, SLOW_PREFILL, ask, blocks_of
from tests.scheduler.cluster.test_cluster_client import generate, text_of
from xllm_compile.scheduler import errors
from xllm_compile.scheduler.cluster.placer import Placer
from xllm_compile.scheduler.cluster.stats import ClusterStats
from xllm_compile.scheduler.policies.fetch import FetchRules
from xllm_compile.scheduler.policies.routing import RoutingRules

PROMPT = [*PREFIX, 100]
RULES = FetchRules(least_wait_s=60)


@pytest.fixture
async def start(make_cluster):
    """start(): a cluster whose instance `a` has the prefix and takes no work, so that `b` gets it."""

    async def start(rules=RULES, **options):
        given = {"is_transferring": True} | options
        cluster = await make_cluster(a=given, b=given)
        cluster.client._placer = Placer(RoutingRules(policy="prefix"), fetch=rules)
        for instance in cluster.instances.values():
            instance.servicer.profile = SLOW_PREFILL
        await cluster.until(lambda: all(each.load.profile for each in cluster.cluster.instances()))
        await cluster.register("a")
        assert await ask(cluster, PREFIX, "first") == 0
        await cluster.register()
        await whole(cluster, "a")
        cluster.instances["a"].service.is_draining = True
        await cluster.until(lambda: [each.takes_work for each in cluster.cluster.instances()] == [False, True])
        return cluster

    return start


async def whole(cluster, *names):
    """Until the gateway knows that these have all of the prefix."""
    async with asyncio.timeout(10):
        while dict.fromkeys(names, 48) != {name: has.device for name, has in cached(cluster).items()}:
            await asyncio.sleep(0.01)


def cached(cluster):
    return cluster.cluster.kv.match(blocks_of(PREFIX))


def counts(cluster):
    stats: ClusterStats = cluster.cluster.stats
    return stats.num_fetches, stats.num_failed_fetches, stats.num_fetched_tokens


async def at_rest(cluster):
    async with asyncio.timeout(30):
        for instance in cluster.instances.values():
            while True:
                stats = instance.engine.stats()
                if not (stats.reservations.num_open or stats.hand_overs.num_open or stats.kv_tokens_used):
                    break
                await asyncio.sleep(0.01)


async def test_a_prefix_is_fetched_once(start):
    cluster = await start()
    assert await ask(cluster, PROMPT, "1") == 48
    assert counts(cluster) == (1, 0, 48)
    await whole(cluster, "a", "b")
    assert await ask(cluster, PROMPT, "2") == 48
    assert counts(cluster) == (1, 0, 48)
    assert cluster.instances["a"].engine.stats().hand_overs.num_prefixes == 1
    assert cluster.instances["b"].engine.stats().reservations.num_claimed == 1
    await at_rest(cluster)


async def test_the_text_is_that_of_one_instance(start):
    cluster = await start()
    outputs = await generate(cluster, prompt=PROMPT, n=2, max_tokens=5)
    assert [text_of(outputs, index) for index in (0, 1)] == ["efghi"] * 2
    assert counts(cluster)[0] == 2


async def test_switched_off_all_is_computed(start):
    cluster = await start(rules=None)
    assert await ask(cluster, PROMPT) == 0
    assert counts(cluster) == (0, 0, 0)


async def test_instances_without_transfers_compute(start):
    cluster = await start(is_transferring=False)
    assert await ask(cluster, PROMPT) == 0
    assert counts(cluster) == (0, 0, 0)


async def test_what_was_evicted_meanwhile_is_computed(start):
    cluster = await start()
    await cluster.instances["a"].engine._call(cluster.instances["a"].engine.engine._kv_cache.forget)
    # The gateway may not have heard of it.
    assert await ask(cluster, PROMPT) == 0
    assert counts(cluster) in ((0, 0, 0), (1, 1, 0))
    await at_rest(cluster)


@pytest.fixture
async def held(monkeypatch, start):
    """A cluster whose sender never answers."""
    is_reached = asyncio.Event()

    async def send(self, request, context):
        is_reached.set()
        await asyncio.Event().wait()

    monkeypatch.setattr("xllm_compile.scheduler.instance_api.InstanceServicer.SendPrefix", send)
    cluster = await start()
    return cluster, is_reached


async def test_a_sender_that_is_killed_costs_computing(held):
    cluster, is_reached = held
    answer = asyncio.create_task(ask(cluster, PROMPT))
    await is_reached.wait()
    await cluster.instances["a"].stop()
    assert await answer == 0
    assert counts(cluster) == (1, 1, 0)
    await at_rest(cluster)


async def test_a_sender_that_is_too_slow_is_not_waited_for_and_remembered(held, monkeypatch):
    cluster, _ = held
    monkeypatch.setattr(cluster.client._placer, "wait_s", lambda fetch: 0.05)
    heard = []
    monkeypatch.setattr(cluster.client._placer, "copied", lambda *values: heard.append(values))
    assert await ask(cluster, PROMPT) == 0
    assert counts(cluster) == (1, 1, 0)
    (source, target, num_tokens, seconds) = heard[0]
    assert (source.name, target.name, num_tokens) == ("a", "b", 48) and seconds >= 0.05


async def test_a_client_that_leaves_meanwhile_leaves_nothing(held):
    cluster, is_reached = held
    task = asyncio.create_task(ask(cluster, PROMPT))
    await is_reached.wait()
    assert cluster.instances["b"].engine.stats().reservations.num_open == 1
    task.cancel()
    await asyncio.wait([task])
    await at_rest(cluster)


async def test_an_abort_meanwhile_is_not_lost(held, monkeypatch):
    cluster, is_reached = held
    monkeypatch.setattr(cluster.client._placer, "wait_s", lambda fetch: 0.2)
    task = asyncio.create_task(generate(cluster, prompt=PROMPT, max_tokens=20))
    await is_reached.wait()
    await cluster.client.abort("r")
    outputs = await task
    assert outputs[-1].outputs[0].finish_reason == "abort"
    assert cluster.instances["b"].runner.num_steps == 0
    await at_rest(cluster)


async def test_a_receiver_without_room_computes(start, monkeypatch):
    async def refuse(self, request):
        raise errors.queue_full("full", 1.0)

    cluster = await start()
    monkeypatch.setattr("xllm_compile.scheduler.instance_api.InstanceServicer._reserve", refuse)
    assert await ask(cluster, PROMPT) == 0
    assert counts(cluster) == (1, 1, 0)
