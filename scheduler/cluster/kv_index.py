"""Which instances have the KV of which blocks, and so how much of a prompt each need not compute.

A block is known by 60 bits of its digest, which Python keeps in 32 bytes: of ten million blocks none is likely to be
taken for another, and one that were would cost a wrong guess. Its holders are the bits of one number, three for each
instance, so that a prompt is looked up on all instances at once, one access for each of its blocks.
"""

import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from sys import byteorder

from xllm_compile.runtime.kv_events import KVTier
from xllm_compile.scheduler.cluster.state import CachedTokens

_NUM_TIERS = len(KVTier)
_DIGEST_BYTES = 16
_SHIFT = 4
"""64 bits of a digest to 60."""
# Equal sets of holders are one object. The table of them starts anew when it has so many.
_MAX_SETS = 1 << 14
# Keys of blocks that are gone, beyond as many as there are, before they are sorted out.
_MOST_STALE = 1 << 10


def block_keys(digests: bytes) -> list[int]:
    """Of digests one after the other. Raises ValueError where they end early."""
    if len(digests) % _DIGEST_BYTES:
        raise ValueError(f"{len(digests)} bytes of digests are no multiple of {_DIGEST_BYTES}")
    # The first of the two words of each.
    return [word >> _SHIFT for word in memoryview(digests).cast("Q")[::2].tolist()]


class KVIndex:
    """Belongs to one thread."""

    def __init__(self, block_tokens: int = 16) -> None:
        """block_tokens are those of a block, on all instances."""
        self.block_tokens = block_tokens
        self._holders: dict[int, int] = {}
        """Block -> bits of those who have it, never 0. Bit _NUM_TIERS * slot + tier."""
        self._members: list[KVHolder | None] = []
        """By slot; None is free."""
        self._on_device = 0
        """The bits of all members' devices."""
        self._sets: dict[int, int] = {}

    @property
    def num_blocks(self) -> int:
        return len(self._holders)

    def num_blocks_by_name(self) -> dict[str, int]:
        """Of which each instance has KV in whatever tier."""
        return {member.name: member.num_blocks for member in self._members if member is not None}

    def add(self, name: str) -> "KVHolder":
        """One start of an instance. It has nothing yet."""
        slot = next((index for index, member in enumerate(self._members) if member is None), len(self._members))
        if slot == len(self._members):
            self._members.append(None)
        self._members[slot] = holder = KVHolder(self, name, slot)
        self._on_device |= 1 << _NUM_TIERS * slot
        return holder

    def match(self, digests: Sequence[bytes]) -> dict[str, CachedTokens]:
        """By name, what of a prompt with these blocks each instance has; those with nothing are left out.

        As instances read it: blocks on the device as far as they go, then those of the tiers below.
        """
        on_device, below = self._on_device, list[_Run]()
        found: list[_Run] = []
        for index, digest in enumerate(digests):
            bits = self._holders.get(int.from_bytes(digest[:8], byteorder) >> _SHIFT, 0)
            if gone := on_device & ~bits:
                # Most have nothing at all.
                for slot in _slots(gone if index else gone & (bits >> 1 | bits >> 2)):
                    below.append(_Run(slot, index))
                    found.append(below[-1])
                on_device ^= gone
            if below:
                below = [run for run in below if run.take(bits)]
            if not on_device and not below:
                break
        found += [_Run(slot, len(digests)) for slot in _slots(on_device)] if digests else []
        return {member.name: run.tokens(self.block_tokens) for run in found if (member := self._members[run.slot])}

    def _store(self, keys: Iterable[int], bit: int, own: int) -> list[int]:
        """The keys that had none of the own bits."""
        holders, new = self._holders, []
        for key in keys:
            bits = holders.get(key, 0)
            if not bits & own:
                new.append(key)
            holders[key] = self._shared(bits | bit)
        return new

    def _remove(self, keys: Iterable[int], bits: int, own: int) -> int:
        """How many keys lost the last of the own bits."""
        holders, num_lost = self._holders, 0
        for key in keys:
            before = holders.get(key, 0)
            left = before & ~bits
            num_lost += bool(before & own) and not left & own
            if left:
                holders[key] = self._shared(left)
            elif before:
                del holders[key]
        return num_lost

    def _shared(self, bits: int) -> int:
        if len(self._sets) > _MAX_SETS:
            self._sets.clear()
        return self._sets.setdefault(bits, bits)

    def _leave(self, slot: int) -> None:
        self._members[slot] = None
        self._on_device &= ~(1 << _NUM_TIERS * slot)


class KVHolder:
    """What one start of an instance has, until `close`."""

    def __init__(self, index: KVIndex, name: str, slot: int) -> None:
        self.name = name
        self.place = 0
        """Number of the change that comes next; 0 where all of it has to come."""
        self._index = index
        self._slot = slot
        self._own = 0b111 << _NUM_TIERS * slot
        self._keys = array("Q")
        """All that it has, and some that it had: 8 bytes each, where a set would take 66."""
        self.num_blocks = 0
        """Of which it has KV in whatever tier."""

    def store(self, tier: KVTier, keys: Sequence[int]) -> None:
        """Of block_keys."""
        new = self._index._store(keys, self._bit(tier), self._own)
        self._keys.extend(new)
        self.num_blocks += len(new)

    def remove(self, tier: KVTier, keys: Sequence[int]) -> None:
        self.num_blocks -= self._index._remove(keys, self._bit(tier), self._own)
        if len(self._keys) > 2 * self.num_blocks + _MOST_STALE:
            holders = self._index._holders
            self._keys = array("Q", {key for key in self._keys if holders.get(key, 0) & self._own})

    def clear(self) -> None:
        """It has nothing, as far as is known."""
        self._index._remove(self._keys, self._own, self._own)
        self._keys = array("Q")
        self.num_blocks = self.place = 0

    def close(self) -> None:
        """It is gone."""
        self.clear()
        self._index._leave(self._slot)

    def _bit(self, tier: KVTier) -> int:
        return 1 << _NUM_TIERS * self._slot + tier


class _Run:
    """The blocks of a prompt that one instance has one after the other."""

    __slots__ = ("_num_device", "_num_disk", "_num_host", "slot")

    def __init__(self, slot: int, num_device: int) -> None:
        self.slot = slot
        self._num_device, self._num_host, self._num_disk = num_device, 0, 0

    def take(self, bits: int) -> bool:
        """The next block, if it is in a tier below."""
        tiers = bits >> _NUM_TIERS * self.slot & 0b110
        if tiers & 1 << KVTier.HOST:
            self._num_host += 1
        elif tiers:
            self._num_disk += 1
        return tiers != 0

    def tokens(self, block_tokens: int) -> CachedTokens:
        return CachedTokens(
            device=block_tokens * self._num_device,
            host=block_tokens * self._num_host,
            disk=block_tokens * self._num_disk,
        )


def _slots(bits: int) -> Iterator[int]:
    """Of bits of devices."""
    num_words = -(-bits.bit_length() // 64)
    # Word by word: each step on the number itself would take as long as there are instances.
    for at, word in enumerate(struct.unpack(f"<{num_words}Q", bits.to_bytes(8 * num_words, "little"))):
        while word:
            lowest = word & -word
            yield (64 * at + lowest.bit_length() - 1) // _NUM_TIERS
            word ^= lowest
