"""A batch that has not ended, as the runner sees it; and whose turn it is."""

import asyncio
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from xllm_compile.scheduler.batches.input_file import CheckedInput
from xllm_compile.scheduler.batches.records import Batch, FinalStatus, Line


@dataclass(kw_only=True, slots=True, eq=False)
class OpenBatch:
    batch: Batch
    """As it was taken up; its status and counts are the store's."""
    is_started: bool
    """Its input was found good, and its lines are in the store."""
    checked: CheckedInput | None = None
    """What was found in its input, until that is in the store."""
    waiting: deque[Line] = field(default_factory=deque)
    """Read from the store, to be started."""
    last_read: int = 0
    """Number of the last line that was read."""
    is_read: bool = False
    """There are no more in the store."""
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    """Lines under way, or the check of its input."""
    num_unrecorded: int = 0
    """Lines that were answered, with a result that is not on disk."""
    turn: int = 0
    """When it last started a line."""
    held_until_s: float = 0.0
    """No line of it starts before; of the monotonic clock."""
    suspects: set[int] = field(default_factory=set)
    """Lines that the server has ended with before, and may once more: each of them runs alone."""
    ends_as: FinalStatus | None = None
    """No more lines start, and it ends as soon as nothing of it is under way."""

    @property
    def num_running(self) -> int:
        return len(self.tasks) + self.num_unrecorded

    @property
    def has_lines(self) -> bool:
        return self.ends_as is None and self.is_started and (bool(self.waiting) or not self.is_read)

    @property
    def is_complete(self) -> bool:
        return self.is_started and self.is_read and not self.waiting and self.num_running == 0


def next_batch(batches: Iterable[OpenBatch], now_s: float) -> OpenBatch | None:
    """The one with the fewest lines under way; of those, the one whose turn was longest ago."""
    ready = (batch for batch in batches if batch.has_lines and now_s >= batch.held_until_s)
    return min(ready, key=lambda batch: (batch.num_running, batch.turn), default=None)
