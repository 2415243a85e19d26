"""Key/value memory of one instance: contiguous slots in reserved address space, a budget counted in tokens.

Every layer is one tensor [num_slots, max_model_len, 2, num_kv_heads, head_dim] over an anonymous mapping that
reserves addresses only; the kernel hands out a page when it is first written. So many more slots may exist than
memory would hold full ones, and the budget limits the tokens that are live at the same time.

A slot's **length** is what its sequence has stored, its **extent** (>= length) is what was ever written and not given
back. A freed slot keeps its extent, because pages that are present need no page fault. When the budget is needed
elsewhere, the tail beyond the length is given back with madvise. Two things follow: live lengths alone decide
whether a sequence can grow, and the extents of all slots together never exceed the budget.
"""

import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Python names it from 3.13 on; the number is the same on every Linux this runs on.
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


class KVCacheFullError(RuntimeError):
    """No slot is free. The scheduler never lets this happen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KVCacheConfig:
    """Shape and budget. Raises ValueError when not even one sequence of max_model_len fits."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    max_model_len: int
    """Most tokens of one sequence; the length of a slot."""
    num_slots: int
    """Most sequences that hold KV at the same time."""
    kv_memory_bytes: int
    """Budget of physical memory over all layers. Partly filled pages at the two ends of a slot come on top."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim", "max_model_len", "num_slots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        affordable = self.kv_memory_bytes // self.bytes_per_token
        if affordable < self.max_model_len:
            needed = self.max_model_len * self.bytes_per_token
            raise ValueError(
                f"kv_memory_bytes={self.kv_memory_bytes} holds {affordable} tokens of {self.bytes_per_token} bytes, "
                f"one sequence of max_model_len={self.max_model_len} needs {needed} bytes; "
                f"raise kv_memory_bytes to at least {needed} or lower max_model_len to at most {affordable}"
            )

    @property
    def layer_token_bytes(self) -> int:
        return 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def bytes_per_token(self) -> int:
        return self.num_layers * self.layer_token_bytes

    @property
    def total_tokens(self) -> int:
        """Tokens that may be live at the same time."""
        return min(self.kv_memory_bytes // self.bytes_per_token, self.num_slots * self.max_model_len)


class KVCache:
    """The slots of one instance. Not thread-safe: it belongs to the engine's thread."""

    def __init__(self, config: KVCacheConfig) -> None:
        self.config = config
        self._maps = [_reserve(_layer_bytes(config)) for _ in range(config.num_layers)]
        shape = (config.num_slots, config.max_model_len, 2, config.num_kv_heads, config.head_dim)
        self.layers: list[Tensor] = [
            # The count keeps the bytes that round the mapping up to a page out of the tensor.
            torch.frombuffer(mapping, dtype=config.dtype, count=math.prod(shape)).view(shape)
            for mapping in self._maps
        ]
        """One tensor [num_slots, max_model_len, 2, num_kv_heads, head_dim] per layer, at a fixed address."""
        self._lengths: dict[int, int] = {}
        self._extents = [0] * config.num_slots
        self._idle = set(range(config.num_slots))
        self._used_tokens = 0
        self._touched_tokens = 0
        self.on_release: Callable[[int, int, int], None] = lambda slot, keep, extent: None
        """Hears of pages that are given back, for the ranks that hold the same slots: see release_pages."""

    @property
    def num_slots(self) -> int:
        return self.config.num_slots

    @property
    def num_free_slots(self) -> int:
        return len(self._idle)

    @property
    def total_tokens(self) -> int:
        return self.config.total_tokens

    @property
    def used_tokens(self) -> int:
        """Tokens of live sequences."""
        return self._used_tokens

    @property
    def touched_tokens(self) -> int:
        """Tokens whose pages are present, those kept for reuse included; never above total_tokens."""
        return self._touched_tokens

    def length(self, slot: int) -> int:
        return self._lengths[slot]

    def can_append(self, num_tokens: int) -> bool:
        """Whether live sequences may grow by num_tokens in all."""
        return self._used_tokens + num_tokens <= self.total_tokens

    def allocate(self) -> int:
        """An empty slot, the idle one with the most pages present. Raises KVCacheFullError when none is idle."""
        if not self._idle:
            raise KVCacheFullError(f"all {self.num_slots} KV slots are in use; free one first or raise num_slots")
        slot = max(self._idle, key=lambda idle: (self._extents[idle], -idle))
        self._idle.remove(slot)
        self._lengths[slot] = 0
        return slot

    def extend(self, slot: int, num_tokens: int) -> bool:
        """Let the slot's sequence store num_tokens more. False, and no change, when the budget does not allow it."""
        length = self._lengths[slot] + num_tokens
        if length > self.config.max_model_len:
            raise ValueError(
                f"slot {slot} would hold {length} tokens, max_model_len={self.config.max_model_len}; "
                "finish the sequence before it outgrows its slot"
            )
        if not self.can_append(num_tokens):
            return False
        growth = length - self._extents[slot]
        self._lengths[slot] = length
        if growth > 0:
            self._make_room(growth)
            self._extents[slot] = length
            self._touched_tokens += growth
        self._used_tokens += num_tokens
        return True

    def shrink(self, slot: int, num_tokens: int) -> None:
        """Take back the last num_tokens that the slot was extended by. Their pages stay for now."""
        self._lengths[slot] -= num_tokens
        self._used_tokens -= num_tokens

    def free(self, slot: int) -> None:
        """End the slot's sequence. Its pages stay until they are needed elsewhere."""
        self._used_tokens -= self._lengths.pop(slot)
        self._idle.add(slot)

    def _make_room(self, num_tokens: int) -> None:
        """Give back pages until num_tokens more may be touched: idle slots first, the fullest last."""
        excess = self._touched_tokens + num_tokens - self.total_tokens
        if excess <= 0:
            return
        idle = sorted(
            (slot for slot in self._idle if self._extents[slot]), key=lambda slot: (self._extents[slot], slot)
        )
        # A live slot can hold pages beyond its length, left from the longer sequence that had it before.
        surplus = {slot: self._extents[slot] - length for slot, length in self._lengths.items()}
        live = sorted((slot for slot in surplus if surplus[slot] > 0), key=lambda slot: (-surplus[slot], slot))
        for slot in (*idle, *live):
            if excess <= 0:
                return
            excess -= self._release_tail(slot)
        assert excess <= 0, "live lengths fit the budget, so the tails beyond them must be enough"

    def _release_tail(self, slot: int) -> int:
        """Give back what the slot holds beyond its length; returns the tokens that this frees."""
        keep = self._lengths.get(slot, 0)
        extent = self._extents[slot]
        self.release_pages(slot, keep, extent)
        self.on_release(slot, keep, extent)
        self._extents[slot] = keep
        self._touched_tokens -= extent - keep
        return extent - keep

    def release_pages(self, slot: int, keep: int, extent: int) -> None:
        """Give the pages of the slot's tokens [keep, extent) back to the system. Keeps no account."""
        token_bytes = self.config.layer_token_bytes
        base = slot * self.config.max_model_len * token_bytes
        begin, end = whole_pages(base + keep * token_bytes, base + extent * token_bytes)
        if begin < end:
            for mapping in self._maps:
                mapping.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def whole_pages(begin: int, end: int) -> tuple[int, int]:
    """The byte range of the pages that lie inside [begin, end). Pages shared with a neighbour stay out."""
    page = mmap.PAGESIZE
    first = -(-begin // page) * page
    return first, max(first, end // page * page)


def _layer_bytes(config: KVCacheConfig) -> int:
    return config.num_slots * config.max_model_len * config.layer_token_bytes


def _reserve(num_bytes: int) -> mmap.mmap:
    # Private, because MADV_DONTNEED gives nothing back on shared anonymous memory.
    try:
        mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    except (OSError, OverflowError) as err:
        raise ValueError(
            f"the system refuses {num_bytes} bytes of addresses for one layer's KV cache ({err}); lower num_slots or "
            "max_model_len, or set vm.overcommit_memory to 0 or 1"
        ) from err
    # A huge page would bring 2 MiB per slot and layer on the first token, and the budget would mean nothing.
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        mapping.madvise(mmap.MADV_NOHUGEPAGE)
    return mapping
