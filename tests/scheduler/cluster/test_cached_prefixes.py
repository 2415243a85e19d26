"""A gateway that knows which instance has which prefix, on instances behind real gRPC."""

import asyncio
from dataclasses import replace

from tests.scheduler.cluster.test_cluster_client import generate
from xllm_compile.runtime.memory.prefix_cache import BlockChain
from xllm_compile.scheduler.cluster.placer import Placer
from xllm_compile.scheduler.cluster.state import CachedTokens, StepProfile
from xllm_compile.scheduler.policies.routing import RoutingRules

# Whatever else takes time in a test is nothing beside computing a prefix.
SLOW_PREFILL = StepProfile(num_tokens=(1, 1000), seconds=(1e-3, 10.0), sequence_s=0.0, key_s=0.0, pair_s=0.0)
PREFIX = [1 + at % 90 for at in range(48)]


def blocks_of(prompt):
    chain = BlockChain(16)
    chain.update(prompt)
    return chain.digests


async def ask(cluster, prompt, request_id="r", **fields):
    """The tokens that were cached."""
    outputs = await generate(cluster, request_id, prompt=prompt, max_tokens=2, **fields)
    return outputs[-1].num_cached_tokens


async def known(cluster, prompt, *names):
    """Wait until these have all of it on their devices, and others nothing."""
    expected = {name: CachedTokens(device=len(prompt)) for name in names}
    async with asyncio.timeout(10):
        while cluster.cluster.kv.match(blocks_of(prompt)) != expected:
            await asyncio.sleep(0.01)


async def start(make_cluster, **instances):
    cluster = await make_cluster(**instances)
    cluster.client._placer = Placer(RoutingRules(policy="prefix"))
    for instance in cluster.instances.values():
        instance.servicer.profile = SLOW_PREFILL
    await cluster.until(lambda: all(each.load.profile for each in cluster.cluster.instances()))
    return cluster


async def test_requests_go_where_their_prefix_is(make_cluster):
    cluster = await start(make_cluster, a={}, b={}, c={})
    assert await ask(cluster, PREFIX) == 0
    home = next(name for name, each in cluster.instances.items() if each.runner.num_steps)
    await known(cluster, PREFIX, home)
    for index in range(6):
        assert await ask(cluster, [*PREFIX, 100 + index], str(index)) == 48
    assert [name for name, each in cluster.instances.items() if each.runner.num_steps] == [home]


async def test_what_was_evicted_is_no_reason_any_more(make_cluster):
    cluster = await start(make_cluster, a={}, b={})
    await ask(cluster, PREFIX)
    home = next(name for name, each in cluster.instances.items() if each.runner.num_steps)
    await known(cluster, PREFIX, home)
    await cluster.instances[home].engine.sleep()
    cluster.instances[home].engine.wake_up()
    await known(cluster, PREFIX)
    assert await ask(cluster, PREFIX, "again") == 0


async def test_prompts_that_are_computed_in_any_case_are_not_looked_up(make_cluster):
    cluster = await start(make_cluster, a={})
    await ask(cluster, PREFIX)
    await known(cluster, PREFIX, "a")
    shapes = []
    place = cluster.client._placer.place

    def noted(key, shape, *rest, **options):
        shapes.append(shape)
        return place(key, shape, *rest, **options)

    cluster.client._placer.place = noted
    assert await ask(cluster, PREFIX, "logprobs", prompt_logprobs=0) == 0
    assert await ask(cluster, PREFIX, "plain") == 32
    assert [len(shape.digests) for shape in shapes] == [0, 3]


async def test_a_restarted_instance_has_nothing(make_cluster):
    cluster = await start(make_cluster, a={}, b={})
    await ask(cluster, PREFIX)
    home = next(name for name, each in cluster.instances.items() if each.runner.num_steps)
    other = "b" if home == "a" else "a"
    await known(cluster, PREFIX, home)
    # On both, by asking the other one itself.
    cluster.instances[home].service.is_draining = True
    await cluster.until(lambda: not all(each.takes_work for each in cluster.cluster.instances()))
    await ask(cluster, PREFIX, "elsewhere")
    await known(cluster, PREFIX, home, other)
    cluster.instances[home].service.is_draining = False
    await cluster.instances[home].stop()
    await cluster.instances[home].engine.sleep()
    cluster.instances[home].engine.wake_up()
    await cluster.instances[home].start()
    await cluster.register()
    await known(cluster, PREFIX, other)
    assert cluster.cluster.kv.num_blocks == 3


async def test_a_gateway_that_starts_later_knows_all(make_cluster):
    cluster = await start(make_cluster, a={})
    await ask(cluster, PREFIX)
    await known(cluster, PREFIX, "a")
    await cluster.cluster.update([])
    assert cluster.cluster.kv.num_blocks == 0
    await cluster.register()
    await known(cluster, PREFIX, "a")


async def test_blocks_of_another_size_are_left_out(make_cluster, caplog):
    cluster = await start(make_cluster, a={})
    await cluster.cluster.update([])
    info = cluster.instances["a"].info
    cluster.instances["a"].info = replace(info, block_tokens=32)
    await cluster.register()
    assert "blocks of 32 tokens, others of 16" in caplog.text
