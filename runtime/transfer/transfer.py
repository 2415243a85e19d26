"""What moves KV between two instances must be able to do.

An instance offers one region of memory to others: the physical pages of its KV cache. Others write to byte ranges of
it that it told them to, with a token it gave them for that; gRPC carries the ranges, a transfer carries only bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class TransferError(RuntimeError):
    """The peer is gone or refuses, or the bytes did not arrive whole. Says which peer, and what to look at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ByteRange:
    """Bytes of the sender's region, and where they go in the receiver's. Offsets from the region's start."""

    source: int
    target: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Region:
    """Memory of this process that peers may write, shown as a file and as an address."""

    file: int
    """Descriptor of the memfd; stays the owner's."""
    num_bytes: int


class Receiver(Protocol):
    """The side that owns the region. Thread-safe."""

    @property
    def address(self) -> str:
        """SCHEME:REST, what `connect` of the same scheme takes."""
        ...

    def permit(self, token: bytes, ranges: Sequence[tuple[int, int]]) -> None:
        """Let the holder of the token write to these (offset, num_bytes) of the region, and nowhere else."""
        ...

    def revoke(self, token: bytes) -> None:
        """Refuse writes of the token from here on. Returns when none is under way: the pages may be used again."""
        ...

    def close(self) -> None: ...


class Sender(Protocol):
    """A connection to one receiver. Thread-safe; calls wait until the bytes are there."""

    def write(self, token: bytes, ranges: Sequence[ByteRange]) -> None:
        """Copy the ranges. Raises TransferError; some of the bytes may have arrived then."""
        ...

    def close(self) -> None: ...
