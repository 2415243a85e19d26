"""Registrations come and go, and the view follows. The registry is that in memory, a table answers the probes."""

import asyncio
import logging
from contextlib import AsyncExitStack

import pytest

from tests.scheduler.registry.instances import instance
from xllm_compile.scheduler.cluster.state import Role
from xllm_compile.scheduler.registry import instance_record
from xllm_compile.scheduler.registry.liveness import Answer, LivenessConfig
from xllm_compile.scheduler.registry.membership import Membership
from xllm_compile.scheduler.registry.memory_registry import MemoryRegistry
from xllm_compile.scheduler.registry.registration import Registration
from xllm_compile.scheduler.registry.registry import RegistryUnavailableError

KEY = "ns/xllm/instances/a"


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Answers(dict):
    """By (name, incarnation); whoever is not named serves."""

    async def __call__(self, info):
        return self.get((info.name, info.incarnation), Answer.SERVING)


@pytest.fixture
def answers():
    return Answers()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
async def registry():
    async with MemoryRegistry() as registry:
        yield registry


@pytest.fixture
async def members(registry, answers, clock):
    config = LivenessConfig(probe_period_s=0.01)
    async with Membership(registry, namespace="ns", config=config, probe=answers, clock=clock) as members:
        yield members


async def until(members, *expected):
    """Wait for exactly these (name, incarnation, health)."""
    view = members.view
    async with asyncio.timeout(20):
        while (seen := [(info.name, info.incarnation, health.value) for info, health in view]) != list(expected):
            try:
                view = await members.wait_for_change(view)
            except TimeoutError:
                pytest.fail(f"the view stays {seen}")


def registered(registry, info, **options):
    return Registration(registry, info, namespace="ns", **{"ttl_s": 1, **options})


async def test_an_instance_is_there_from_registering_to_its_end(registry, members, answers):
    assert not members.view
    async with registered(registry, instance()) as registration:
        await until(members, ("a", "1", "active"))
        assert registration.registered.is_set()
        assert (await registry.get(KEY)).lease_id
        answers["a", "1"] = Answer.NOT_SERVING
    await until(members, ("a", "1", "suspect"))
    assert await registry.get(KEY) is None
    answers["a", "1"] = Answer.NONE
    await until(members)


async def test_who_is_registered_already_is_seen(registry, answers, clock):
    async with registered(registry, instance()), registered(registry, instance("b", role=Role.DECODE)):
        while len((await registry.snapshot("")).entries) < 2:
            await asyncio.sleep(0)
        async with Membership(registry, namespace="ns", probe=answers, clock=clock) as members:
            await until(members, ("a", "1", "active"), ("b", "1", "active"))


async def test_a_killed_instance_loses_its_lease_and_then_its_work(registry, members, answers, clock):
    await registry.put(KEY, instance_record.to_json(instance()), lease_id=await registry.grant_lease(1))
    await until(members, ("a", "1", "active"))
    answers["a", "1"] = Answer.NONE
    await until(members, ("a", "1", "suspect"))
    clock.now_s += 15
    await until(members)


async def test_an_instance_that_lost_its_lease_but_answers_keeps_its_work(registry, members, clock):
    await registry.put(KEY, instance_record.to_json(instance()))
    await until(members, ("a", "1", "active"))
    await registry.delete(KEY)
    await until(members, ("a", "1", "lease_lost"))
    for _ in range(10):
        clock.now_s += 2
        members.heard("a", "1")
        await asyncio.sleep(0.01)
    await until(members, ("a", "1", "lease_lost"))


async def test_a_failed_call_has_the_instance_probed(registry, members, answers, clock):
    await registry.put(KEY, instance_record.to_json(instance()))
    await until(members, ("a", "1", "active"))
    answers["a", "1"] = Answer.NONE
    members.doubt("a", "0")
    await asyncio.sleep(0.03)
    await until(members, ("a", "1", "active"))
    members.doubt("a", "1")
    await until(members, ("a", "1", "suspect"))
    answers["a", "1"] = Answer.SERVING
    await until(members, ("a", "1", "active"))


async def test_a_restart_at_the_same_address_replaces_the_instance(registry, members, answers, clock):
    await registry.put(KEY, instance_record.to_json(instance()), lease_id=await registry.grant_lease(1))
    await until(members, ("a", "1", "active"))
    async with registered(registry, instance(incarnation="2")):
        await until(members, ("a", "2", "active"))
        # What the first one's last calls and its lease's end still bring.
        answers["a", "1"] = Answer.NONE
        members.doubt("a", "1")
        members.heard("a", "1")
        registry.expire_leases()
        await asyncio.sleep(1.1)
        await until(members, ("a", "2", "active"))


async def test_a_registration_that_was_lost_is_put_back(registry, members, answers):
    async with registered(registry, instance()):
        await until(members, ("a", "1", "active"))
        lease_id = (await registry.get(KEY)).lease_id
        await registry.revoke_lease(lease_id)
        await until(members, ("a", "1", "lease_lost"))
        await until(members, ("a", "1", "active"))
        assert (await registry.get(KEY)).lease_id != lease_id
        await registry.delete(KEY)
        await until(members, ("a", "1", "lease_lost"))
        await until(members, ("a", "1", "active"))


async def test_of_two_of_one_name_the_later_has_it(registry, members, caplog):
    async with AsyncExitStack() as first_one:
        first = await first_one.enter_async_context(registered(registry, instance()))
        await until(members, ("a", "1", "active"))
        async with registered(registry, instance(incarnation="2")):
            await until(members, ("a", "2", "active"))
            async with asyncio.timeout(20):
                while first.registered.is_set():
                    await asyncio.sleep(0.01)
            assert "another process has registered as ns/xllm/instances/a" in caplog.text
            # The first one's leaving takes nothing of the second's.
            await first_one.aclose()
            await asyncio.sleep(0.01)
            assert (await registry.get(KEY)).value == instance_record.to_json(instance(incarnation="2"))
            await until(members, ("a", "2", "active"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"{", "no JSON"),
        (instance_record.to_json(instance()).replace(b'"mix"', b'"mixed"'), "role='mixed' must be one of"),
        (instance_record.to_json(instance("b")), "name='b' is not the key's"),
    ],
)
async def test_a_value_that_is_no_instance_is_left_out_and_said_once(registry, members, caplog, value, message):
    caplog.set_level(logging.WARNING)
    await registry.put(KEY, value)
    await registry.put("ns/xllm/instances/c", instance_record.to_json(instance("c")))
    await until(members, ("c", "1", "active"))
    await members._list()
    assert caplog.text.count(f"registry key {KEY} holds no instance and is left out: {message}") == 1


async def test_an_instance_whose_entry_becomes_unreadable_has_to_answer(registry, members, answers):
    await registry.put(KEY, instance_record.to_json(instance()))
    await until(members, ("a", "1", "active"))
    await registry.put(KEY, b"?")
    await until(members, ("a", "1", "lease_lost"))


async def test_compaction_is_a_reason_to_list(registry, answers, clock):
    class Behind(MemoryRegistry):
        """Compacts right after the first listing, before the watch begins."""

        is_first = True

        async def snapshot(self, prefix):
            snapshot = await super().snapshot(prefix)
            if self.is_first:
                self.is_first = False
                await self.put(KEY, instance_record.to_json(instance()))
                self.compact(self.revision)
            return snapshot

    async with (
        Behind() as registry,
        Membership(registry, namespace="ns", probe=answers, clock=clock) as members,
    ):
        await until(members, ("a", "1", "active"))


async def test_without_the_registry_the_view_stays_and_an_instance_registers_later(members, answers, clock, caplog):
    class Away(MemoryRegistry):
        is_away = True

        async def snapshot(self, prefix):
            if self.is_away:
                raise RegistryUnavailableError("no answer")
            return await super().snapshot(prefix)

        async def grant_lease(self, ttl_s):
            if self.is_away:
                raise RegistryUnavailableError("no answer")
            return await super().grant_lease(ttl_s)

    async with (
        Away() as registry,
        Membership(registry, namespace="ns", probe=answers, clock=clock) as members,
        registered(registry, instance()) as registration,
    ):
        await asyncio.sleep(0)
        assert members.view == () and not registration.registered.is_set()
        registry.is_away = False
        await until(members, ("a", "1", "active"))
    assert "could not register ns/xllm/instances/a, trying until it works: no answer" in caplog.text
    assert "cannot see new instances: no answer" in caplog.text
