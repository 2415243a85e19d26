"""The waiting queue: sorted by a key that does not change while a sequence waits."""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from typing import Generic

from xllm_compile.runtime.policies.order import Key
from xllm_compile.runtime.policies.state import Q


class WaitingQueue(Generic[Q]):
    """Sequences by ``key``, which must be unique. Counts what it holds."""

    def __init__(self, key: Callable[[Q], Key]) -> None:
        self._key = key
        self._items: list[Q] = []
        self._tokens: dict[int, int] = {}
        """By id: what each was counted with. It may find some of them computed while it waits."""
        self.num_tokens = 0
        """Tokens that its sequences have to prefill."""
        self.num_offline = 0
        self.num_offline_tokens = 0
        """Of num_tokens."""

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Q]:
        return iter(self._items)

    def add(self, sequence: Q) -> None:
        insort(self._items, sequence, key=self._key)
        self._tokens[id(sequence)] = sequence.num_uncomputed_tokens
        self.num_tokens += sequence.num_uncomputed_tokens
        self.num_offline += sequence.is_offline
        self.num_offline_tokens += sequence.num_uncomputed_tokens * sequence.is_offline

    def remove(self, sequence: Q) -> None:
        index = bisect_left(self._items, self._key(sequence), key=self._key)
        found = self._items.pop(index)
        assert found is sequence, "the key of a waiting sequence does not change"
        num_tokens = self._tokens.pop(id(sequence))
        self.num_tokens -= num_tokens
        self.num_offline_tokens -= num_tokens * sequence.is_offline
        self.num_offline -= sequence.is_offline
