"""A small store that the processes of a service share: keys under leases, one order of all changes, watches.

Two implementations: memory_registry.py, in the process, and etcd_registry.py, over gRPC.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

NO_LEASE = 0


class RegistryError(Exception):
    """Base of what a registry raises."""


class RegistryUnavailableError(RegistryError):
    """It did not answer in time. What was asked may have been done."""


class RegistryDeniedError(RegistryError):
    """It refused the user, or an operation of that user. Asking again does not help."""


class CompactedError(RegistryError):
    """The changes since the wanted revision are gone: take a snapshot and watch from there."""


class LeaseLostError(RegistryError):
    """The lease has expired or was revoked: its keys are gone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    key: str
    value: bytes
    revision: int
    """Of the put that wrote it; grows with every change of any key."""
    lease_id: int = NO_LEASE


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    key: str
    entry: Entry | None
    """None: the key was deleted, or its lease ended."""
    revision: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    entries: tuple[Entry, ...]
    """By key."""
    revision: int
    """Of the registry: a watch from here misses nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Guard:
    """A write with a guard happens only if the key has this revision at that moment; 0: if it does not exist.

    On the key itself it is compare-and-put, on the leader's key it fences the writes of a leader.
    """

    key: str
    revision: int


class Registry(Protocol):
    """Each call raises RegistryUnavailableError when there is no answer in time, RegistryDeniedError when refused."""

    async def get(self, key: str) -> Entry | None: ...

    async def snapshot(self, prefix: str) -> Snapshot:
        """All keys that begin with the prefix."""
        ...

    async def put(self, key: str, value: bytes, *, lease_id: int = NO_LEASE, guard: Guard | None = None) -> int | None:
        """The revision of the write; None where the guard did not hold.

        A key belongs to the lease of its last put. Raises LeaseLostError when that lease is gone.
        """
        ...

    async def delete(self, key: str, *, guard: Guard | None = None) -> bool:
        """False where the guard did not hold. A key that does not exist is deleted."""
        ...

    def watch(self, prefix: str, revision: int) -> AsyncIterator[tuple[Change, ...]]:
        """Changes after the revision, in order; a batch holds all changes of each of its revisions.

        Waits through the registry's absence. Raises CompactedError when changes it has not yielded are gone.
        """
        ...

    async def grant_lease(self, ttl_s: int) -> int:
        """The id of a lease that ends after ttl_s without keep_alive. The registry may make short ones longer."""
        ...

    async def keep_alive(self, lease_id: int) -> None:
        """The lease's time starts anew. Raises LeaseLostError."""
        ...

    async def revoke_lease(self, lease_id: int) -> None:
        """Ends the lease and deletes its keys; one that is gone already is no error."""
        ...

    async def close(self) -> None: ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...
