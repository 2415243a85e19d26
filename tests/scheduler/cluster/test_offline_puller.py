"""An offline request that decodes is taken over by an instance with slack: its KV moves, its tokens stay the same."""

import asyncio
import threading
from dataclasses import replace

import pytest

from tests.runtime.sides import room_for
from tests.scheduler.cluster.test_cluster_client import generate, ids_of
from tests.scheduler.cluster.test_reservations import PROMPT, Pair, TransferringInstance, ends_empty
from tests.scheduler.policies.instances import PROFILE
from xllm_compile.scheduler.cluster.offline_puller import OfflinePuller
from xllm_compile.scheduler.cluster.placer import Placer
from xllm_compile.scheduler.cluster.state import InstanceInfo, Role
from xllm_compile.scheduler.policies.colocation import ColocationRules

NUM_TOKENS = 30


class Steps(threading.Event):
    """A runner's gate that lets so many steps through, or all once it is set."""

    def __init__(self) -> None:
        super().__init__()
        self._steps = threading.Semaphore(0)

    def allow(self, num_steps: int) -> None:
        self._steps.release(num_steps)

    def set(self) -> None:
        super().set()
        self._steps.release(1000)

    def wait(self, timeout: float | None = None) -> bool:
        return self._steps.acquire(timeout=30)


class DescribedInstance(TransferringInstance):
    def _describe(self, incarnation: str) -> InstanceInfo:
        return replace(super()._describe(incarnation), transfers=self.engine.engine.transfer_addresses)


class Pools(Pair):
    """What prefills takes offline requests whole, step by step; what decodes has slack."""

    def __init__(self) -> None:
        super().__init__()
        self.instances.clear()
        for name, role in (("p", Role.PREFILL), ("d", Role.DECODE)):
            self.instances[name] = DescribedInstance(name, role)
        self.steps = self.instances["p"].runner.gate = Steps()
        rules = ColocationRules(tpot_slo_s=1.0)
        self.puller = OfflinePuller(self.cluster, self.client, Placer(), rules)

    async def start(self) -> None:
        await super().start()
        for instance in self.instances.values():
            instance.servicer.profile = PROFILE
        await self.until(lambda: all(each.load.profile for each in self.cluster.instances()))

    async def begin(self, num_steps: int, **fields) -> "asyncio.Task[list]":
        """Of an offline request, as far as so many steps bring it; the first one is its prompt's."""
        given = {"max_tokens": NUM_TOKENS, "offline": True} | fields
        task = asyncio.create_task(generate(self, prompt=PROMPT, **given))
        self.steps.allow(num_steps)
        async with asyncio.timeout(10):
            while sum(one.num_tokens for one in self.client.completions()) < len(PROMPT) + num_steps:
                await asyncio.sleep(0.005)
        return task


@pytest.fixture
async def pools():
    pools = Pools()
    await pools.start()
    yield pools
    await pools.close()


@pytest.fixture
def expected(pools):
    """Of the model alone."""
    return pools.d.runner.greedy(list(PROMPT), NUM_TOKENS)


async def test_it_goes_on_with_its_kv_and_its_tokens(pools, expected):
    task = await pools.begin(6)
    (completion,) = pools.client.completions()
    assert completion.offline_at == "p"
    await pools.puller.pull()
    assert completion.offline_at is None
    # Once it is on its way nobody moves it again.
    await pools.puller.pull()
    pools.steps.set()
    assert ids_of(await task) == expected
    assert (pools.cluster.stats.num_migrated, pools.cluster.stats.num_handed_over) == (1, 0)
    await ends_empty(pools)
    assert (pools.d.reservations.num_claimed, pools.d.servicer.num_releases) == (1, 0)
    # No step for the prompt.
    assert sum(len(step.token_ids) for step in pools.d.runner.steps) <= NUM_TOKENS - 6


async def test_online_requests_and_prompts_are_not_moved(pools):
    online = await pools.begin(2, offline=False)
    await pools.puller.pull()
    assert pools.d.reservations.num_open == 0
    pools.steps.set()
    await online


async def test_without_room_it_stays(pools, expected):
    for index in range(7):
        await pools.d.engine.reserve(room_for(str(index), [index]))
    task = await pools.begin(3)
    await pools.puller.pull()
    assert pools.cluster.stats.num_migrations_refused == 1
    pools.steps.set()
    assert ids_of(await task) == expected
    assert pools.cluster.stats.num_migrated == 0
    for index in range(7):
        await pools.d.engine.release(str(index))


async def test_one_that_ends_first_leaves_nothing(pools):
    task = await pools.begin(3, max_tokens=4)
    await pools.puller.pull()
    pools.steps.set()
    outputs = await task
    assert outputs[-1].outputs[0].finish_reason == "length"
    assert pools.cluster.stats.num_migrated == 0
    await ends_empty(pools)


async def test_a_client_that_leaves_meanwhile_leaves_nothing(pools):
    task = await pools.begin(3)
    await pools.puller.pull()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    pools.steps.set()
    await ends_empty(pools)


async def test_the_one_that_took_it_over_may_die(pools, expected):
    pools.hook("d", "start", "die")
    task = await pools.begin(6)
    await pools.puller.pull()
    pools.steps.set()
    assert ids_of(await task) == expected
    assert (pools.cluster.stats.num_migrated, pools.cluster.stats.num_lost) == (1, 1)
    await ends_empty(pools)
