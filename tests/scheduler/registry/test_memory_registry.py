"""What is the memory registry's own: its clock and its history. The rest is in test_registry.py."""

import asyncio

import pytest

from xllm_compile.scheduler.registry.memory_registry import MemoryRegistry
from xllm_compile.scheduler.registry.registry import CompactedError, LeaseLostError


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
async def registry(clock):
    async with MemoryRegistry(clock=clock) as registry:
        yield registry


async def test_a_lease_ends_exactly_when_it_was_not_kept_alive(registry, clock):
    lease = await registry.grant_lease(3)
    await registry.put("k", b"", lease_id=lease)
    clock.now_s += 2.9
    await registry.keep_alive(lease)
    clock.now_s += 2.9
    registry.expire_leases()
    assert await registry.get("k") is not None
    clock.now_s += 0.1
    registry.expire_leases()
    assert await registry.get("k") is None
    with pytest.raises(LeaseLostError, match="has expired"):
        await registry.keep_alive(lease)


async def test_a_lease_that_is_due_takes_no_keys_even_before_it_is_looked_at(registry, clock):
    lease = await registry.grant_lease(3)
    clock.now_s += 3
    with pytest.raises(LeaseLostError):
        await registry.put("k", b"", lease_id=lease)
    with pytest.raises(LeaseLostError):
        await registry.keep_alive(lease)


async def test_the_end_of_a_lease_is_one_change_of_all_its_keys(registry, clock):
    lease = await registry.grant_lease(3)
    for key in ("b", "a", "c"):
        await registry.put(key, b"", lease_id=lease)
    await registry.put("c", b"now without the lease")
    changes = registry.watch("", registry.revision)
    clock.now_s += 3
    registry.expire_leases()
    batch = await anext(changes)
    assert [(change.key, change.entry) for change in batch] == [("a", None), ("b", None)]
    assert {change.revision for change in batch} == {registry.revision}


async def test_a_watcher_that_is_too_far_behind_is_told():
    async with MemoryRegistry(max_history=10) as registry:
        for number in range(21):
            await registry.put("k", b"%d" % number)
        with pytest.raises(CompactedError, match="revision 1 are gone"):
            await anext(registry.watch("", 1))
        batch = await anext(registry.watch("", registry.revision - 10))
        assert [change.entry.value for change in batch if change.entry] == [b"%d" % number for number in range(11, 21)]


async def test_a_waiting_watcher_is_told_of_a_compaction_beyond_it(registry):
    changes = registry.watch("k", registry.revision)
    waiting = asyncio.ensure_future(anext(changes))
    await asyncio.sleep(0)
    await registry.put("k", b"")
    registry.compact(registry.revision)
    with pytest.raises(CompactedError):
        await waiting


async def test_a_watcher_that_has_seen_all_does_not_mind_a_compaction(registry):
    changes = registry.watch("k", registry.revision)
    waiting = asyncio.ensure_future(anext(changes))
    await registry.put("other", b"")
    await asyncio.sleep(0)
    registry.compact(registry.revision)
    await asyncio.sleep(0)
    await registry.put("k", b"")
    assert [change.key for change in await waiting] == ["k"]


@pytest.mark.parametrize("ttl_s", [0, -1])
async def test_a_lease_needs_a_time(registry, ttl_s):
    with pytest.raises(ValueError, match=f"ttl_s={ttl_s} of a lease must be in"):
        await registry.grant_lease(ttl_s)


async def test_there_is_no_empty_key(registry):
    with pytest.raises(ValueError, match="a key must not be empty"):
        await registry.put("", b"")


@pytest.mark.parametrize("revision", [0, 1, 5])
async def test_only_the_past_is_compacted(registry, revision):
    await registry.put("k", b"")
    with pytest.raises(ValueError, match=f"revision={revision} to compact must be in"):
        registry.compact(revision)
