"""The registry in the process. Other processes can use it through registry_server.py."""

import asyncio
import time
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from xllm_compile.scheduler.registry.registry import (
    NO_LEASE,
    Change,
    CompactedError,
    Entry,
    Guard,
    LeaseLostError,
    Snapshot,
)

MAX_TTL_S = 9_000_000_000
"""etcd's."""


@dataclass(slots=True)
class _Lease:
    ttl_s: int
    due_s: float
    keys: set[str] = field(default_factory=set)


class MemoryRegistry:
    """Of one event loop. `clock` gives seconds; leases end on its time, looked at when they are due by the loop's."""

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, first_revision: int = 1, max_history: int = 10_000
    ) -> None:
        """max_history is in changes: a watcher further behind gets CompactedError."""
        self._clock = clock
        self._max_history = max_history
        self._entries: dict[str, Entry] = {}
        self._leases: dict[int, _Lease] = {}
        # Where revisions begin above those of an earlier process, its leases are not taken for ours either.
        self._next_lease_id = first_revision
        self._revision = first_revision
        # Changes of revisions above _compacted, in order.
        self._history: list[Change] = []
        self._compacted = first_revision
        self._changed = asyncio.Event()
        self._expiry: asyncio.TimerHandle | None = None

    @property
    def revision(self) -> int:
        return self._revision

    async def get(self, key: str) -> Entry | None:
        return self._entries.get(key)

    async def snapshot(self, prefix: str) -> Snapshot:
        entries = sorted((e for key, e in self._entries.items() if key.startswith(prefix)), key=lambda e: e.key)
        return Snapshot(entries=tuple(entries), revision=self._revision)

    async def put(self, key: str, value: bytes, *, lease_id: int = NO_LEASE, guard: Guard | None = None) -> int | None:
        if not key:
            raise ValueError("a key must not be empty")
        if not self._holds(guard):
            return None
        if lease_id != NO_LEASE:
            self._lease(lease_id)
        self._detach(key)
        if lease_id != NO_LEASE:
            self._leases[lease_id].keys.add(key)
        self._revision += 1
        entry = Entry(key=key, value=value, revision=self._revision, lease_id=lease_id)
        self._entries[key] = entry
        self._publish([Change(key=key, entry=entry, revision=self._revision)])
        return self._revision

    async def delete(self, key: str, *, guard: Guard | None = None) -> bool:
        if not self._holds(guard):
            return False
        self._remove([key])
        return True

    async def watch(self, prefix: str, revision: int) -> AsyncIterator[tuple[Change, ...]]:
        while True:
            changed = self._changed
            if revision < self._compacted:
                raise CompactedError(f"changes since revision {revision} are gone: the first left is {self._compacted}")
            start = bisect_right(self._history, revision, key=lambda change: change.revision)
            batch = tuple(change for change in self._history[start:] if change.key.startswith(prefix))
            revision = max(revision, self._revision)
            if batch:
                yield batch
            else:
                await changed.wait()

    async def grant_lease(self, ttl_s: int) -> int:
        if not 1 <= ttl_s <= MAX_TTL_S:
            raise ValueError(f"ttl_s={ttl_s} of a lease must be in [1, {MAX_TTL_S}]")
        lease_id = self._next_lease_id
        self._next_lease_id += 1
        self._leases[lease_id] = _Lease(ttl_s=ttl_s, due_s=self._clock() + ttl_s)
        self._look_later()
        return lease_id

    async def keep_alive(self, lease_id: int) -> None:
        lease = self._lease(lease_id)
        lease.due_s = self._clock() + lease.ttl_s

    def ttl_s(self, lease_id: int) -> int:
        """What the lease was granted for. Raises LeaseLostError."""
        return self._lease(lease_id).ttl_s

    async def revoke_lease(self, lease_id: int) -> None:
        lease = self._leases.pop(lease_id, None)
        if lease is not None:
            self._remove(sorted(lease.keys))

    def expire_leases(self) -> None:
        """End the leases that are due. Called by the loop; a test with a clock of its own calls it too."""
        now_s = self._clock()
        for lease_id in [i for i, lease in self._leases.items() if lease.due_s <= now_s]:
            self._remove(sorted(self._leases.pop(lease_id).keys))
        self._look_later()

    def compact(self, revision: int) -> None:
        """Forget the changes up to a revision, as etcd does by time or size."""
        if not self._compacted < revision <= self._revision:
            raise ValueError(f"revision={revision} to compact must be in ({self._compacted}, {self._revision}]")
        del self._history[: bisect_right(self._history, revision, key=lambda change: change.revision)]
        self._compacted = revision
        # A watcher that was behind learns of it.
        self._wake()

    async def close(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _holds(self, guard: Guard | None) -> bool:
        if guard is None:
            return True
        entry = self._entries.get(guard.key)
        return (entry.revision if entry is not None else 0) == guard.revision

    def _lease(self, lease_id: int) -> _Lease:
        lease = self._leases.get(lease_id)
        if lease is None or lease.due_s <= self._clock():
            raise LeaseLostError(f"lease {lease_id} has expired or was revoked")
        return lease

    def _detach(self, key: str) -> None:
        entry = self._entries.get(key)
        if entry is not None and entry.lease_id in self._leases:
            self._leases[entry.lease_id].keys.discard(key)

    def _remove(self, keys: list[str]) -> None:
        keys = [key for key in keys if key in self._entries]
        if not keys:
            return
        self._revision += 1
        for key in keys:
            self._detach(key)
            del self._entries[key]
        self._publish([Change(key=key, entry=None, revision=self._revision) for key in keys])

    def _publish(self, changes: list[Change]) -> None:
        self._history += changes
        # Cut rarely, and much: cutting the front of a list moves all of it.
        if len(self._history) > 2 * self._max_history:
            self.compact(self._history[-self._max_history - 1].revision)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _look_later(self) -> None:
        """Have the loop look when the next lease is due."""
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        if self._leases:
            due_s = min(lease.due_s for lease in self._leases.values())
            # Not at once again where the clock is not the loop's.
            delay_s = max(0.01, due_s - self._clock())
            self._expiry = asyncio.get_running_loop().call_later(delay_s, self.expire_leases)
