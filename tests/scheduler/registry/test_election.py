"""At most one leads, against each registry; who leads no more writes no more."""

import asyncio

import pytest

from tests.scheduler.registry.test_etcd_registry import client
from xllm_compile.scheduler.registry.election import stand
from xllm_compile.scheduler.registry.registry import LeaseLostError


class Candidate:
    """Stands; `elected` is set while it leads."""

    def __init__(self, registry, key, name, ttl_s=1):
        self.elected = asyncio.Event()
        self.guard = None
        self.num_terms = 0
        self.error = None
        self.task = asyncio.create_task(stand(registry, key, name, self.lead, ttl_s=ttl_s))

    async def lead(self, guard):
        self.guard = guard
        self.num_terms += 1
        self.elected.set()
        try:
            await self._until_error()
        finally:
            self.elected.clear()

    async def _until_error(self):
        while self.error is None:
            await asyncio.sleep(0.01)
        error, self.error = self.error, None
        raise error

    async def leads(self):
        async with asyncio.timeout(20):
            await self.elected.wait()

    async def is_deposed(self):
        async with asyncio.timeout(20):
            while self.elected.is_set():
                await asyncio.sleep(0.01)

    async def leave(self):
        self.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await self.task


@pytest.fixture
async def stands(registry, prefix):
    candidates = []

    def stands(name):
        candidates.append(Candidate(registry, prefix + "leader", name))
        return candidates[-1]

    yield stands
    for candidate in candidates:
        if not candidate.task.done():
            await candidate.leave()


async def test_one_leads_and_the_next_follows(registry, prefix, stands):
    first = stands("first")
    await first.leads()
    second = stands("second")
    # Long enough for a keep-alive or two.
    await asyncio.sleep(1.2)
    assert first.elected.is_set() and not second.elected.is_set()
    assert (await registry.get(prefix + "leader")).value == b"first"
    await first.leave()
    assert not first.elected.is_set()
    await second.leads()
    assert (await registry.get(prefix + "leader")).value == b"second"
    assert second.guard.revision > first.guard.revision


async def test_a_killed_leader_is_followed_when_its_lease_ends(registry, prefix, stands):
    await registry.put(prefix + "leader", b"killed", lease_id=await registry.grant_lease(1))
    await stands("next").leads()


async def test_a_leader_that_lost_its_lease_stops_and_its_writes_are_refused(registry, prefix, stands):
    first = stands("first")
    await first.leads()
    old = first.guard
    assert await registry.put(prefix + "data", b"1", guard=old) is not None
    await registry.revoke_lease((await registry.get(prefix + "leader")).lease_id)
    await registry.put(prefix + "leader", b"another", lease_id=await registry.grant_lease(60))
    await first.is_deposed()
    assert await registry.put(prefix + "data", b"2", guard=old) is None
    assert (await registry.get(prefix + "data")).value == b"1"
    # It stands again.
    await registry.delete(prefix + "leader")
    await first.leads()
    assert first.guard.revision > old.revision and first.num_terms == 2


async def test_a_key_that_begins_alike_is_none_of_ours(registry, prefix, stands):
    first, other = stands("first"), prefix + "leader-of-others"
    await first.leads()
    await registry.put(other, b"")
    await registry.delete(other)
    await asyncio.sleep(0.1)
    assert first.num_terms == 1 and first.elected.is_set()


async def test_a_leader_whose_write_was_refused_stands_again(stands):
    first = stands("first")
    await first.leads()
    first.error = LeaseLostError("the guard did not hold")
    async with asyncio.timeout(20):
        while first.num_terms < 2:
            await asyncio.sleep(0.01)


async def test_an_error_of_the_leaders_work_ends_the_election_and_frees_the_key(registry, prefix, stands):
    first = stands("first")
    await first.leads()
    first.error = KeyError("a bug")
    with pytest.raises(KeyError, match="a bug"):
        await first.task
    assert await registry.get(prefix + "leader") is None


async def test_of_many_candidates_one_leads_at_a_time(stands):
    candidates = [stands(str(number)) for number in range(6)]
    order = []
    while candidates:
        async with asyncio.timeout(20):
            while not (leading := [c for c in candidates if c.elected.is_set()]):
                await asyncio.sleep(0.005)
        assert len(leading) == 1
        order.append(leading[0])
        candidates.remove(leading[0])
        await leading[0].leave()
    revisions = [candidate.guard.revision for candidate in order]
    assert revisions == sorted(revisions) and len(set(revisions)) == 6


@pytest.mark.integration
async def test_the_leader_outlives_etcd(etcd):
    async with client(etcd.endpoint, timeout_s=20) as registry:
        first = Candidate(registry, "/leader", "first", ttl_s=10)
        await first.leads()
        second = Candidate(registry, "/leader", "second", ttl_s=10)
        etcd.kill()
        await asyncio.to_thread(etcd.start)
        assert await registry.put("/data", b"", guard=first.guard) is not None
        assert first.num_terms == 1 and not second.elected.is_set()
        await first.leave()
        await second.leads()
        await second.leave()
