"""Regions of test content."""

import fcntl
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

from xllm_compile.runtime.transfer.transfer import Region


@contextmanager
def memory(num_bytes: int, seed: int | None = None) -> Iterator[Region]:
    """A region as CpuMemory makes them; zeros, or random bytes of the seed."""
    file = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(file, num_bytes)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        if seed is not None:
            os.pwrite(file, content(num_bytes, seed), 0)
        yield Region(file=file, num_bytes=num_bytes)
    finally:
        os.close(file)


def content(num_bytes: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(num_bytes)


def read(region: Region, offset: int = 0, num_bytes: int | None = None) -> bytes:
    return os.pread(region.file, region.num_bytes if num_bytes is None else num_bytes, offset)
