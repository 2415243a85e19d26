import asyncio

import pytest

from xllm_compile.scheduler.registry.lease import keep_alive
from xllm_compile.scheduler.registry.memory_registry import MemoryRegistry
from xllm_compile.scheduler.registry.registry import LeaseLostError, RegistryUnavailableError


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Away(MemoryRegistry):
    """Gone for the first `absences` calls, each of which takes a second."""

    def __init__(self, clock, absences):
        super().__init__(clock=clock)
        self.time, self.absences, self.num_kept = clock, absences, 0

    async def keep_alive(self, lease_id):
        if self.absences:
            self.absences -= 1
            self.time.now_s += 1
            raise RegistryUnavailableError("away")
        await super().keep_alive(lease_id)
        self.num_kept += 1


async def test_a_short_absence_is_survived():
    async with Away(Clock(), absences=2) as registry:
        kept = asyncio.create_task(keep_alive(registry, await registry.grant_lease(3), 3, clock=registry.time))
        async with asyncio.timeout(20):
            while not registry.num_kept:
                await asyncio.sleep(0.01)
        assert not kept.done()
        kept.cancel()


async def test_a_lease_that_could_not_be_kept_for_its_time_counts_as_lost():
    async with Away(Clock(), absences=100) as registry:
        lease_id = await registry.grant_lease(1)
        with pytest.raises(LeaseLostError, match=f"lease {lease_id} of 1 s could not be kept alive: away"):
            async with asyncio.timeout(20):
                await keep_alive(registry, lease_id, 1, clock=registry.time)
        assert registry.absences == 99


async def test_a_lease_that_is_gone_is_lost():
    async with MemoryRegistry() as registry:
        with pytest.raises(LeaseLostError, match="has expired or was revoked"):
            async with asyncio.timeout(20):
                await keep_alive(registry, 77, 1)
