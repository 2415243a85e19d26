"""How a block of KV lies outside of this process: behind a mark of the format and a checksum of what follows."""

import xxhash

_MAGIC = b"XLLM-KV1"
HEADER_BYTES = len(_MAGIC) + 16


class DamagedBlockError(ValueError):
    """A block is not what was written. Caught where tiers are read: it is a miss."""


def header(data: bytes) -> bytes:
    return _MAGIC + xxhash.xxh3_128_digest(data)


def seal(data: bytes) -> bytes:
    return header(data) + data


def unseal(content: bytes) -> bytes:
    """Raises DamagedBlockError."""
    data = content[HEADER_BYTES:]
    if content[:HEADER_BYTES] != header(data):
        raise DamagedBlockError(f"a block of {len(content)} bytes is torn or altered")
    return data
