"""The waiting queue: sorted by a key that does not change while a sequence waits."""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from typing import Generic

from xllm_compile.runtime.policies.order import Key
from xllm_compile.runtime.policies.state import S


class WaitingQueue(Generic[S]):
    """Sequences by ``key``, which must be unique. Counts what it holds."""

    def __init__(self, key: Callable[[S], Key]) -> None:
        self._key = key
        self._items: list[S] = []
        self.num_tokens = 0
        """Tokens that its sequences have to prefill."""
        self.num_offline = 0

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[S]:
        return iter(self._items)

    def add(self, sequence: S) -> None:
        insort(self._items, sequence, key=self._key)
        self._count(sequence, 1)

    def remove(self, sequence: S) -> None:
        index = bisect_left(self._items, self._key(sequence), key=self._key)
        found = self._items.pop(index)
        assert found is sequence, "the key of a waiting sequence does not change"
        self._count(sequence, -1)

    def _count(self, sequence: S, sign: int) -> None:
        self.num_tokens += sign * sequence.num_uncomputed_tokens
        self.num_offline += sign * sequence.is_offline
