"""One leader among the processes of a service: whoever created the leader's key, as long as its lease lives.

The others watch the key and race when it goes. All of them read and route; only the leader writes for all, and each of
its writes carries its guard: one that was held up until another leads is refused by the registry.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import NoReturn

from xllm_compile.scheduler.registry.lease import DEFAULT_TTL_S, keep_alive
from xllm_compile.scheduler.registry.registry import (
    CompactedError,
    Guard,
    LeaseLostError,
    Registry,
    RegistryError,
)
from xllm_compile.scheduler.tasks import gather_or_cancel

logger = logging.getLogger(__name__)

LEADER_KEY = "/xllm/leader"
"""A namespace of the user's may come before it."""

_RETRY_S = 1.0

Lead = Callable[[Guard], Awaitable[None]]
"""What a leader does, from its election until it is cancelled. A write that its guard refuses: raise LeaseLostError."""


async def stand(registry: Registry, key: str, name: str, lead: Lead, *, ttl_s: int = DEFAULT_TTL_S) -> NoReturn:
    """Stand for election until cancelled, which resigns.

    `lead` runs while elected. It is cancelled when the lease is lost or could not be kept for ttl_s; then this process
    stands again. Where `lead` returns, the process stays the leader; what else it raises ends this call. A leader that
    was killed is followed after ttl_s. `name` is told to those who read the key.
    """
    is_warned = False
    while True:
        try:
            entry = await registry.get(key)
            if entry is not None:
                await _until_changed(registry, Guard(key=key, revision=entry.revision))
            else:
                await _race(registry, key, name, lead, ttl_s)
                is_warned = False
        except LeaseLostError as err:
            logger.warning("%s leads no more: %s", name, err)
        except RegistryError as err:
            if not is_warned:
                logger.warning("no election of %s, trying until there is one: %s", key, err)
                is_warned = True
            await asyncio.sleep(_RETRY_S)


async def _race(registry: Registry, key: str, name: str, lead: Lead, ttl_s: int) -> None:
    """Returns when another was faster. Raises LeaseLostError when the leadership ended, or what lead does."""
    lease_id = await registry.grant_lease(ttl_s)
    try:
        absent = Guard(key=key, revision=0)
        revision = await registry.put(key, name.encode(), lease_id=lease_id, guard=absent)
        if revision is not None:
            logger.info("%s leads: %s", name, key)
            await _lead(registry, Guard(key=key, revision=revision), lead, lease_id, ttl_s)
    finally:
        await _resign(registry, lease_id)


async def _lead(registry: Registry, guard: Guard, lead: Lead, lease_id: int, ttl_s: int) -> None:
    async def work() -> None:
        await lead(guard)

    async def until_deposed() -> None:
        await _until_changed(registry, guard)
        raise LeaseLostError(f"somebody else wrote or deleted {guard.key}")

    await gather_or_cancel([keep_alive(registry, lease_id, ttl_s), until_deposed(), work()])


async def _resign(registry: Registry, lease_id: int) -> None:
    try:
        await registry.revoke_lease(lease_id)
    except RegistryError as err:
        logger.debug("lease %d was not revoked, and ends by itself: %s", lease_id, err)


async def _until_changed(registry: Registry, guard: Guard) -> None:
    """Returns when the guard does not hold any more."""
    while True:
        snapshot = await registry.snapshot(guard.key)
        if [entry.revision for entry in snapshot.entries if entry.key == guard.key] != [guard.revision]:
            return
        try:
            async for changes in registry.watch(guard.key, snapshot.revision):
                if any(change.key == guard.key for change in changes):
                    return
        except CompactedError:
            continue
