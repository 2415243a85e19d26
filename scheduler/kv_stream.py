"""Instance.WatchKv: the changes of an instance's KV as messages, a few together.

Whoever reads too slowly, or comes back too late, gets a snapshot: the engine waits for nobody.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any

from xllm_compile.runtime.kv_events import KVChange, KVEventLog, KVTier
from xllm_compile.scheduler.proto import xllm_pb2

# Changes within it travel together.
COALESCE_S = 0.05
# Of a message: 1 MiB of digests.
MAX_DIGESTS = 1 << 16


async def kv_messages(
    log: KVEventLog, digests: Callable[[], Mapping[KVTier, Sequence[bytes]]], request: Any, *, incarnation: str
) -> AsyncGenerator[Any, None]:
    """KvEvents for a WatchKvRequest, for ever. digests gives all that is there, from any thread."""
    number = request.sequence if request.incarnation == incarnation else 0
    while True:
        changes = log.since(number)
        if changes is None:
            # First the place, then what is there: see kv_events.py.
            number = log.next_number
            for message in _snapshot(digests(), number):
                message.incarnation = incarnation
                yield message
        elif changes:
            for begin in range(0, len(changes), MAX_DIGESTS):
                part = changes[begin : begin + MAX_DIGESTS]
                yield xllm_pb2.KvEvents(
                    incarnation=incarnation,
                    sequence=number,
                    next_sequence=number + len(part),
                    events=_events(part),
                )
                number += len(part)
            await asyncio.sleep(COALESCE_S)
        else:
            await _change(log, number)


def _snapshot(digests: Mapping[KVTier, Sequence[bytes]], next_number: int) -> list[Any]:
    messages = [
        xllm_pb2.KvEvents(events=[_event(tier, True, blocks[begin : begin + MAX_DIGESTS])])
        for tier, blocks in digests.items()
        for begin in range(0, len(blocks), MAX_DIGESTS)
    ] or [xllm_pb2.KvEvents()]
    messages[0].is_snapshot = True
    messages[-1].next_sequence = next_number
    return messages


def _events(changes: Sequence[KVChange]) -> list[Any]:
    runs = groupby(changes, key=lambda change: (change.tier, change.is_stored))
    return [_event(tier, is_stored, (change.digest for change in run)) for (tier, is_stored), run in runs]


def _event(tier: Any, is_stored: bool, digests: Iterable[bytes]) -> Any:
    return xllm_pb2.KvEvent(tier=tier, is_removed=not is_stored, digests=b"".join(digests))


async def _change(log: KVEventLog, number: int) -> None:
    """Wait for the change of that number."""
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:
        # The loop may end before the engine does.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(changed.set)

    log.call_after(number, wake)
    try:
        await changed.wait()
    finally:
        log.forget(wake)
