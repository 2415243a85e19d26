"""What moves KV between two instances must be able to do.

An instance offers one region of memory to others: the physical pages of its KV cache. Others write to byte ranges of
it that it told them to, with a token it gave them for that; gRPC carries the ranges, a transfer carries only bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
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
    """Memory of this process that peers may write, or that it writes to them from: a file in memory."""

    file: int
    """Descriptor of a memfd sealed with F_SEAL_SHRINK; stays the owner's."""
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferConfig:
    """How an instance sends and receives KV."""

    host: str = "127.0.0.1"
    """Address of this machine that peers reach; nothing listens on others."""
    port: int = 0
    """0 takes a free one."""
    secret: bytes = field(default=b"", repr=False)
    """What instances prove to each other that they have. Needed for any host but the loopback."""
    timeout_s: float = 10.0
    """Longest wait for a peer that makes no progress."""
    allow_open_ports: bool = False
    """mooncake and nixl take writes of anybody who reaches their ports: they are refused unless this says that the
    network lets none but instances do so."""
    mooncake_protocol: str = "tcp"
    """What mooncake moves bytes by: tcp, or rdma where the machine has it."""

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s={self.timeout_s} of KV transfers must be above 0")
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"port={self.port} of KV transfers must be in [0, 65535]; 0 takes a free one")


class UnreachableError(TransferError):
    """The peer does not answer: it, or the way to it, stands still."""


class Receiver(Protocol):
    """The side that owns the region. Thread-safe."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """SCHEME:REST, the fastest way first: what a sender's `connect` takes."""
        ...

    def permit(self, token: bytes, ranges: Sequence[tuple[int, int]]) -> None:
        """Let the holder of the token write to these (offset, num_bytes) of the region, and nowhere else.

        The pages have their memory and stay where they are until `revoke`. A token is 16 random bytes or more, and
        good for one permit. Raises ValueError.
        """
        ...

    def revoke(self, token: bytes) -> None:
        """Refuse writes of the token from here on. Returns when none is under way: the pages may be used again.

        A write under way is cut short; its sender gets a TransferError. Of an unknown token nothing happens. Raises
        TransferError where a write by mooncake or nixl, which only its sender can end, outlasts the timeout: the
        pages must not be used again while this instance lives.
        """
        ...

    def close(self) -> None:
        """Ends the writes under way and the threads that take them."""
        ...


class Sender(Protocol):
    """A connection to one receiver. Thread-safe; calls wait until the bytes are there."""

    @property
    def address(self) -> str:
        """The receiver's, of those it has."""
        ...

    def write(self, token: bytes, ranges: Sequence[ByteRange]) -> None:
        """Copy the ranges; nobody may change their bytes meanwhile. Raises TransferError; some may have arrived then.

        ValueError for ranges outside of this side's region.
        """
        ...

    def close(self) -> None:
        """Writes under way fail."""
        ...
