"""Host memory for the KV of preempted sequences, which have it copied back when they go on.

Unlike a tier below the pages it keeps what belongs to one sequence, its unfinished block included, until that sequence
goes on or ends: what was copied out is never computed again. What it takes is bounded; without room a sequence that
loses its place is computed anew.
"""

import ctypes
import time
from dataclasses import dataclass

from xllm_compile.runtime.memory.virtual_memory import VirtualMemory
from xllm_compile.runtime.policies.preemption import SwapPath

_NUM_TRIALS = 3
# How much of the past the measured speed keeps.
_SPEED_DECAY = 0.8


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SwappedKV:
    """The keys and values of a sequence's first num_tokens."""

    num_tokens: int
    data: bytes


class SwapSpace:
    """Belongs to one thread."""

    def __init__(self, max_bytes: int, memory: VirtualMemory) -> None:
        """Times copies of a page of ``memory`` out and back. Raises ValueError when max_bytes is not positive."""
        if max_bytes < 1:
            raise ValueError(f"max_bytes={max_bytes} of the swap space must be at least 1")
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._bytes_per_s = _copy_speed(memory)

    def path(self, kv_bytes_per_token: int) -> SwapPath:
        """What copying costs, as measured."""
        return SwapPath(bytes_per_s=self._bytes_per_s, kv_bytes_per_token=kv_bytes_per_token)

    def has_room(self, num_bytes: int) -> bool:
        return self.num_bytes + num_bytes <= self.max_bytes

    def keep(self, swapped: SwappedKV, seconds: float) -> None:
        """It was copied out in so many seconds; there is room."""
        self.num_bytes += len(swapped.data)
        assert self.num_bytes <= self.max_bytes
        if seconds > 0:
            speed = len(swapped.data) / seconds
            self._bytes_per_s = _SPEED_DECAY * self._bytes_per_s + (1 - _SPEED_DECAY) * speed

    def release(self, swapped: SwappedKV) -> None:
        """Its sequence has gone on, or ended."""
        self.num_bytes -= len(swapped.data)


def _copy_speed(memory: VirtualMemory) -> float:
    """Bytes per second of one direction, the best of a few trials: the first touch of memory is no copy's cost."""
    size = memory.page_bytes
    memory.prepare(0)
    target = ctypes.create_string_buffer(size)
    seconds = []
    for _ in range(_NUM_TRIALS):
        began = time.perf_counter()
        ctypes.memmove(target, memory.read(0, 0, size), size)
        seconds.append(time.perf_counter() - began)
    return 2 * size / max(min(seconds), 1e-9)
