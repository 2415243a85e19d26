"""The instance's side of the registry: its entry is there as long as it lives and takes requests."""

import asyncio
import contextlib
import logging
from types import TracebackType
from typing import Self

from xllm_compile.scheduler.cluster.state import InstanceInfo
from xllm_compile.scheduler.registry import instance_record
from xllm_compile.scheduler.registry.lease import DEFAULT_TTL_S, keep_alive
from xllm_compile.scheduler.registry.registry import (
    NO_LEASE,
    Entry,
    Guard,
    LeaseLostError,
    Registry,
    RegistryError,
    RegistryUnavailableError,
)
from xllm_compile.scheduler.tasks import cancel_all, gather_or_cancel

logger = logging.getLogger(__name__)

_RETRY_S = 1.0
_LEAVE_S = 1.0


class _ReplacedError(Exception):
    """Another process has registered under our name."""


class Registration:
    """Registers on entering, in the background; unregisters on leaving.

    Waits for a registry that is not there, and puts back an entry that was lost. An instance that drains leaves, and
    answers health probes with NOT_SERVING until it ends.
    """

    def __init__(
        self, registry: Registry, info: InstanceInfo, *, namespace: str = "", ttl_s: int = DEFAULT_TTL_S
    ) -> None:
        """ttl_s: the entry outlives a killed instance by so long. namespace comes before the keys."""
        self._registry = registry
        self._info = info
        self._key = namespace + instance_record.PREFIX + info.name
        self._value = instance_record.to_json(info)
        self._ttl_s = ttl_s
        self._lease_id = NO_LEASE
        self._task: asyncio.Task[None] | None = None
        self.registered = asyncio.Event()
        """Set while the entry is there, as far as known."""

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            await cancel_all([self._task])
        self.registered.clear()
        if self._lease_id != NO_LEASE:
            try:
                # The end of the process must not wait for a registry that has ended before it.
                async with asyncio.timeout(_LEAVE_S):
                    await self._registry.revoke_lease(self._lease_id)
            except (RegistryError, TimeoutError) as err:
                reason = str(err) or f"no answer within {_LEAVE_S:g} s"
                logger.warning("could not unregister %s: %s; its lease of %d s will", self._key, reason, self._ttl_s)

    async def _run(self) -> None:
        # An entry that is there before the first put is of a process that had the name before.
        may_replace = True
        is_warned = False
        while True:
            try:
                self._lease_id = await self._registry.grant_lease(self._ttl_s)
                await self._put(may_replace=may_replace)
                may_replace = is_warned = False
                self.registered.set()
                logger.info("registered %s as %s", self._info.address, self._key)
                await gather_or_cancel([keep_alive(self._registry, self._lease_id, self._ttl_s), self._keep_entry()])
            except LeaseLostError as err:
                self.registered.clear()
                logger.warning("registration of %s was lost, registering again: %s", self._key, err)
            except _ReplacedError as err:
                self.registered.clear()
                logger.error("%s: it gets no new requests; give each instance a name of its own", err)
                return
            except RegistryError as err:
                self.registered.clear()
                if not is_warned:
                    logger.warning("could not register %s, trying until it works: %s", self._key, err)
                    is_warned = True
                await asyncio.sleep(_RETRY_S)

    async def _keep_entry(self) -> None:
        """Put back an entry that somebody deleted."""
        while True:
            await asyncio.sleep(self._ttl_s)
            # keep_alive decides how long the registry may be away.
            with contextlib.suppress(RegistryUnavailableError):
                await self._put(may_replace=False)

    async def _put(self, *, may_replace: bool) -> None:
        """Make the entry ours, under our lease."""
        while True:
            entry = await self._registry.get(self._key)
            if entry is not None and entry.value == self._value and entry.lease_id == self._lease_id:
                return
            if entry is not None and not may_replace and not self._is_ours(entry):
                raise _ReplacedError(f"another process has registered as {self._key}")
            guard = Guard(key=self._key, revision=entry.revision if entry is not None else 0)
            if await self._registry.put(self._key, self._value, lease_id=self._lease_id, guard=guard) is not None:
                return

    def _is_ours(self, entry: Entry) -> bool:
        return entry.value == self._value
