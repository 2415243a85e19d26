"""Tiers below the KV cache's pages: blocks of KV in host memory and on disk, under the digests of the prefix cache.

What the pages have no room for any more goes to host memory; what host memory has no room for goes to disk, written by
another thread, and to a store that instances share (`remote_tier.py`). What is wanted again is read from there ahead of
time, and copied from host memory into a sequence's own pages. All are bounded and forget what was used longest ago.
Losing a block costs its computation, never more.
"""

import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from xllm_compile.runtime.kv_events import KVEventLog, KVTier
from xllm_compile.runtime.memory.block_seal import HEADER_BYTES, DamagedBlockError, header, unseal
from xllm_compile.runtime.memory.remote_tier import RemoteTier

_SUFFIX = ".kv"
# Blocks on their way to disk. Beyond it the disk is too slow, and blocks are dropped rather than collected in memory.
_MAX_PENDING_WRITES = 64


@dataclass(kw_only=True, slots=True)
class TierStats:
    """Blocks. Counters only grow, but for the two numbers of bytes."""

    num_offloaded: int = 0
    """Taken from the KV cache's pages."""
    num_restored: int = 0
    """Copied back into pages."""
    num_written: int = 0
    """To disk."""
    num_read: int = 0
    """From disk."""
    num_stored: int = 0
    """Taken by the shared store."""
    num_fetched: int = 0
    """Read from it."""
    num_damaged: int = 0
    """Found torn or altered, and deleted from disk."""
    num_dropped: int = 0
    """Left no tier but were wanted by none: no room, or the disk too slow or full."""
    host_bytes: int = 0
    disk_bytes: int = 0


class DiskTier:
    """Blocks as files in a folder, one each: checked when read, complete or absent after a crash. Thread-safe."""

    def __init__(self, folder: Path, *, max_bytes: int, layout: str) -> None:
        """``layout`` names model, weights and the shape of a block: other layouts have folders of their own.

        Takes over what is there. Raises OSError when the folder cannot be made, ValueError on a bad max_bytes.
        """
        if max_bytes < 1:
            raise ValueError(f"max_bytes={max_bytes} of the disk tier must be at least 1")
        self.folder = folder / layout
        self.log = KVEventLog()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._max_bytes = max_bytes
        self._lock = Lock()
        self._sizes: OrderedDict[bytes, int] = OrderedDict()
        """Digest -> bytes of its file, used longest ago first."""
        self._num_bytes = 0
        for path in sorted(self.folder.iterdir(), key=lambda path: path.stat().st_mtime):
            if path.suffix == _SUFFIX and len(path.stem) == 32:
                self._note(bytes.fromhex(path.stem), path.stat().st_size)
            else:
                # A write that a crash interrupted.
                path.unlink(missing_ok=True)
        self._trim()

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._sizes

    def digests(self) -> list[bytes]:
        with self._lock:
            return list(self._sizes)

    def write(self, digest: bytes, data: bytes) -> None:
        """Keep the block. Raises OSError when the system does not take it; nothing half-written is left."""
        size = HEADER_BYTES + len(data)
        if digest in self._sizes or size > self._max_bytes:
            return
        building = self._path(digest).with_suffix(".part")
        try:
            with building.open("wb") as file:
                file.write(header(data))
                file.write(data)
            # Without fsync: a file that a power cut leaves torn fails its checksum.
            os.replace(building, self._path(digest))
        except OSError:
            building.unlink(missing_ok=True)
            raise
        with self._lock:
            self._note(digest, size)
        self._trim()

    def read(self, digest: bytes) -> bytes | None:
        """The block; None when it is not there. Raises DamagedBlockError, and deletes it, when it is not whole."""
        try:
            content = self._path(digest).read_bytes()
        except OSError:
            self._forget(digest)
            return None
        try:
            data = unseal(content)
        except DamagedBlockError:
            self._forget(digest)
            self._path(digest).unlink(missing_ok=True)
            raise
        with self._lock:
            if digest in self._sizes:
                self._sizes.move_to_end(digest)
        return data

    def _path(self, digest: bytes) -> Path:
        return self.folder / (digest.hex() + _SUFFIX)

    def _note(self, digest: bytes, size: int) -> None:
        is_new = digest not in self._sizes
        self._num_bytes += size - self._sizes.pop(digest, 0)
        self._sizes[digest] = size
        if is_new:
            self.log.record(KVTier.DISK, True, digest)

    def _forget(self, digest: bytes) -> None:
        with self._lock:
            if digest in self._sizes:
                self._num_bytes -= self._sizes.pop(digest)
                self.log.record(KVTier.DISK, False, digest)

    def _trim(self) -> None:
        while True:
            with self._lock:
                if self._num_bytes <= self._max_bytes:
                    return
                digest, size = self._sizes.popitem(last=False)
                self._num_bytes -= size
                self.log.record(KVTier.DISK, False, digest)
            self._path(digest).unlink(missing_ok=True)


class KVTiers:
    """Host memory, and a disk and a shared store behind it if there are any. Thread-safe."""

    def __init__(self, *, host_bytes: int, disk: DiskTier | None = None, store: RemoteTier | None = None) -> None:
        """host_bytes bounds host memory; the store is closed with it. Raises ValueError when it is not positive."""
        if host_bytes < 1:
            raise ValueError(f"host_bytes={host_bytes} of the host tier must be at least 1")
        self.stats = TierStats()
        self._max_bytes = host_bytes
        self._disk = disk
        self._store = store
        self.log = KVEventLog() if disk is None else disk.log
        """Told of the blocks that come and go, here and on the disk."""
        self._lock = Lock()
        self._blocks: OrderedDict[bytes, bytes] = OrderedDict()
        """Used longest ago first."""
        self._writing: dict[bytes, bytes] = {}
        """On their way to disk, and still found here."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="xllm-kv-tiers")

    def __contains__(self, digest: bytes) -> bool:
        """Whether `read` gives it at once."""
        return digest in self._blocks or digest in self._writing

    def digests(self) -> dict[KVTier, list[bytes]]:
        """Of all blocks. What is on its way to disk is on neither."""
        with self._lock:
            host = list(self._blocks)
        return {KVTier.HOST: host, KVTier.DISK: [] if self._disk is None else self._disk.digests()}

    def offload(self, digest: bytes, data: bytes) -> None:
        """Keep the KV of a block that loses its pages."""
        self.stats.num_offloaded += 1
        self._keep(digest, data)

    def read(self, digest: bytes) -> bytes | None:
        """The block from host memory; None when it is not there."""
        with self._lock:
            data = self._blocks.get(digest)
            if data is None:
                return self._writing.get(digest)
            self._blocks.move_to_end(digest)
            return data

    def prefetch(self, digests: Sequence[bytes]) -> Future[None] | None:
        """Bring to host memory the blocks that only disk or store have; None where there is nothing to wait for.

        Stops at the first block that no tier has: what follows it is of no use.
        """
        num_here, is_on_disk, rest = len(digests), False, list[bytes]()
        for index, digest in enumerate(digests):
            if digest in self:
                continue
            if self._disk is None or digest not in self._disk:
                num_here, rest = index, [each for each in digests[index:] if each not in self]
                break
            is_on_disk = True
        if self._store is None or not self._store.is_up:
            rest = []
        return self._thread.submit(self._load, digests[:num_here], rest) if is_on_disk or rest else None

    def flush(self) -> None:
        """Wait until what was started is done."""
        self._thread.submit(lambda: None).result()
        if self._store is not None:
            self._store.flush()

    def close(self) -> None:
        """Write what is in host memory to disk, so that the next start finds it, and end the thread."""
        if self._disk is not None:
            blocks, self._blocks = self._blocks, OrderedDict()
            for digest, data in blocks.items():
                self._thread.submit(self._write, digest, data)
        self._thread.shutdown()
        if self._store is not None:
            self._store.close()

    def _keep(self, digest: bytes, data: bytes) -> None:
        with self._lock:
            if digest not in self._blocks:
                self.log.record(KVTier.HOST, True, digest)
            self.stats.host_bytes += len(data) - len(self._blocks.pop(digest, b""))
            self._blocks[digest] = data
            spilled = []
            while self.stats.host_bytes > self._max_bytes:
                old, content = self._blocks.popitem(last=False)
                self.stats.host_bytes -= len(content)
                self.log.record(KVTier.HOST, False, old)
                spilled.append((old, content))
        self._spill(spilled)

    def _spill(self, blocks: Iterable[tuple[bytes, bytes]]) -> None:
        for digest, data in blocks:
            is_sent = self._store is not None and self._store.write(digest, data, self._note_stored)
            if self._disk is None or len(self._writing) >= _MAX_PENDING_WRITES:
                self.stats.num_dropped += not is_sent
            elif digest not in self._disk:
                self._writing[digest] = data
                self._thread.submit(self._write, digest, data)

    def _note_stored(self, is_kept: bool) -> None:
        self.stats.num_stored += is_kept
        self.stats.num_dropped += not is_kept and self._disk is None

    def _write(self, digest: bytes, data: bytes) -> None:
        assert self._disk is not None
        try:
            self._disk.write(digest, data)
            self.stats.num_written += 1
        except OSError:
            self.stats.num_dropped += 1
        self._writing.pop(digest, None)
        self.stats.disk_bytes = self._disk.num_bytes

    def _load(self, here: Sequence[bytes], in_store: Sequence[bytes]) -> None:
        if self._load_from_disk(here) and in_store:
            assert self._store is not None
            # More than host memory holds would push out its own beginning.
            read = self._store.read(in_store, self._max_bytes // 2)
            self.stats.num_damaged += read.is_damaged
            for digest, data in read.blocks:
                self.stats.num_fetched += 1
                self._keep(digest, data)

    def _load_from_disk(self, digests: Sequence[bytes]) -> bool:
        """Bring those that host memory lacks, as far as it holds them all. Whether none is missing."""
        num_found, left = 0, self._max_bytes
        for digest in digests:
            data = self.read(digest) or self._read_disk(digest)
            if data is None or len(data) > left:
                break
            if digest not in self:
                self._keep(digest, data)
            num_found, left = num_found + 1, left - len(data)
        # What comes before they are used pushes out the last of them first: nothing is of use without its beginning.
        for digest in reversed(digests[:num_found]):
            self.read(digest)
        return num_found == len(digests)

    def _read_disk(self, digest: bytes) -> bytes | None:
        if self._disk is None:
            return None
        try:
            data = self._disk.read(digest)
        except DamagedBlockError:
            self.stats.num_damaged += 1
            return None
        self.stats.num_read += data is not None
        return data
