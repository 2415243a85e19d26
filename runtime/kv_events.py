"""What of the KV can be found, and where: changes in order, for others who keep an index of it.

A change says that a block is there now, or no longer, in one tier. Applying changes twice does no harm, and the last
one of a block decides. So a snapshot needs no lock over the tiers: it is everything that is there at some moment after
its place in the log was read, and what was changed meanwhile is applied once more.
"""

from collections.abc import Callable
from enum import IntEnum
from threading import Lock
from typing import NamedTuple

# Of a digest's 16 bytes and a tuple each: some 10 MB.
MAX_CHANGES = 1 << 16


class KVTier(IntEnum):
    """Where a block is. The numbers are those of proto/xllm.proto."""

    DEVICE = 0
    HOST = 1
    DISK = 2


class KVChange(NamedTuple):
    tier: KVTier
    is_stored: bool
    """Else it was removed."""
    digest: bytes
    """Of runtime/memory/prefix_cache.py."""


class KVEventLog:
    """The last changes, numbered from 1. Thread-safe; nothing is kept before somebody has read."""

    def __init__(self, max_changes: int = MAX_CHANGES) -> None:
        self._max_changes = max_changes
        self._lock = Lock()
        self._changes: list[KVChange] = []
        """A ring, once it is full: number n is at (n - _first) % max_changes."""
        self._first = 1
        """The number that was recorded first."""
        self._next = 1
        self._is_read = False
        self._callbacks: list[Callable[[], None]] = []

    @property
    def next_number(self) -> int:
        """Of the change to come."""
        return self._next

    def record(self, tier: KVTier, is_stored: bool, digest: bytes) -> None:
        """Note a change that has been made. Those of one block come in the order in which they were made."""
        callbacks: list[Callable[[], None]] = []
        with self._lock:
            if self._is_read:
                self._keep(KVChange(tier, is_stored, digest))
                callbacks, self._callbacks = self._callbacks, []
            else:
                self._first += 1
            self._next += 1
        for callback in callbacks:
            callback()

    def since(self, number: int) -> list[KVChange] | None:
        """The changes from that number on; None where they are not there any more, or never were."""
        with self._lock:
            self._is_read = True
            if not self._next - len(self._changes) <= number <= self._next:
                return None
            begin, end = (self._slot(each) for each in (number, self._next))
            if number < self._next and end <= begin:
                return self._changes[begin:] + self._changes[:end]
            return self._changes[begin:end]

    def call_after(self, number: int, callback: Callable[[], None]) -> None:
        """Call it once, in any thread, when there is a change of that number: at once, if there is one.

        It must not wait for anything: it is called where the change was made.
        """
        with self._lock:
            if self._next <= number:
                self._callbacks.append(callback)
                return
        callback()

    def forget(self, callback: Callable[[], None]) -> None:
        """It is no longer to be called; where it has been, nothing happens."""
        with self._lock:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

    def _keep(self, change: KVChange) -> None:
        if len(self._changes) < self._max_changes:
            self._changes.append(change)
        else:
            self._changes[self._slot(self._next)] = change

    def _slot(self, number: int) -> int:
        return (number - self._first) % self._max_changes
