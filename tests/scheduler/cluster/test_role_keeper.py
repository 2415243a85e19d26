import asyncio

import pytest

from xllm_compile.scheduler.cluster.cluster import Cluster
from xllm_compile.scheduler.cluster.role_keeper import POOLS_KEY, RoleKeeper, follow_pools, pools_json, read_pools
from xllm_compile.scheduler.cluster.state import Health, Pool
from xllm_compile.scheduler.policies.roles import RoleRules
from xllm_compile.scheduler.registry.memory_registry import MemoryRegistry
from xllm_compile.scheduler.registry.registry import Guard, LeaseLostError
from xllm_compile.scheduler.tasks import cancel_all

RULES = RoleRules(ttft_slo_s=1.0, tpot_slo_s=0.1)


async def test_the_leader_decides_and_everybody_routes_by_it(make_cluster):
    cluster = await make_cluster(a={}, b={}, c={}, d={})
    registry = MemoryRegistry()
    follower = Cluster()
    await follower.update([(each.info, Health.ACTIVE) for each in cluster.instances.values()])
    await registry.put("/team/leader", b"one")
    leader = await registry.get("/team/leader")
    assert leader is not None
    keeper = RoleKeeper(cluster.cluster, registry, RULES, namespace="/team")
    tasks = [
        asyncio.create_task(keeper.lead(Guard(key="/team/leader", revision=leader.revision))),
        asyncio.create_task(follow_pools(follower, registry, namespace="/team")),
    ]
    async with asyncio.timeout(10):
        while any(each.pool is Pool.MIX for each in follower.instances()):
            await follower.wait_changed(1)
    pools = sorted(each.pool for each in follower.instances())
    assert pools == [Pool.DECODE, Pool.DECODE, Pool.PREFILL, Pool.PREFILL]
    await cancel_all(tasks)
    await follower.close()


async def test_who_leads_no_more_writes_no_more(make_cluster):
    cluster = await make_cluster(a={}, b={})
    registry = MemoryRegistry()
    await registry.put("leader", b"another")
    with pytest.raises(LeaseLostError):
        await RoleKeeper(cluster.cluster, registry, RULES).lead(Guard(key="leader", revision=1_000_000))
    assert await registry.get(POOLS_KEY) is None


def test_pools_of_another_version_are_left_out():
    pools = {"a": Pool.PREFILL, "b": Pool.DECODE_TO_PREFILL}
    assert read_pools(pools_json(pools)) == pools
    for data in (b"{", b'{"a": "dreaming"}', b"[1]"):
        assert read_pools(data) == {}
