"""Who watches this instance: what a gateway holds here ends soon after it stopped watching."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

GRACE_S = 5.0
"""A gateway whose connection broke is back by then; one that was killed holds nothing any longer."""


class Watchers:
    """Belongs to one event loop."""

    def __init__(self, on_gone: Callable[[str], None]) -> None:
        """on_gone is called with the name of one that has not watched for GRACE_S."""
        self._on_gone = on_gone
        self._num_open: Counter[str] = Counter()
        self._leaving: dict[str, asyncio.TimerHandle] = {}

    @contextmanager
    def watching(self, name: str) -> Iterator[None]:
        """One of its streams is open. Without a name it is nobody's."""
        if not name:
            yield
            return
        self._num_open[name] += 1
        if name in self._leaving:
            self._leaving.pop(name).cancel()
        try:
            yield
        finally:
            self._num_open[name] -= 1
            if self._num_open[name] == 0:
                del self._num_open[name]
                loop = asyncio.get_running_loop()
                self._leaving[name] = loop.call_later(GRACE_S, self._leave, name)

    def _leave(self, name: str) -> None:
        del self._leaving[name]
        self._on_gone(name)
