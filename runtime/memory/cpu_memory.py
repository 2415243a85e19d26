"""Pages of a memfd, mapped with MAP_FIXED into addresses reserved with PROT_NONE.

A page that is a whole number of huge pages is made one when it is first mapped: its first byte is touched, which
brings a 4 KiB page, and MADV_COLLAPSE turns all of it into huge ones. That takes 0.2 ms for 2 MiB, where touching the
4 KiB pages one by one takes 1.2 ms; and attention over token-major KV, which jumps a page per token, would be a fifth
slower on 4 KiB pages. MADV_COLLAPSE works whatever /sys/kernel/mm/transparent_hugepage/shmem_enabled says, unless it
says "deny".
"""

import ctypes
import errno
import fcntl
import logging
import mmap
import os
import weakref
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from xllm_compile.runtime.memory.virtual_memory import OutOfMappingsError
from xllm_compile.runtime.transfer.transfer import Region

logger = logging.getLogger(__name__)

# linux/mman.h, linux/falloc.h; Python's mmap module knows none of them in 3.11.
_MAP_FIXED, _MAP_NORESERVE, _PROT_NONE = 0x10, 0x4000, 0
_MADV_COLLAPSE = 25
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
_MAP_FAILED = (1 << 64) - 1

HUGE_PAGE_BYTES = 2 << 20
# Mappings of everything else in the process: libraries, weights, graphs, thread stacks.
_OTHER_MAPPINGS = 4096


class CpuMemory:
    """See VirtualMemory. Physical memory arrives when a page is first mapped; 0 bytes are taken before."""

    def __init__(self, num_pages: int, page_bytes: int) -> None:
        """Raises ValueError when page_bytes is no multiple of the system's pages."""
        if page_bytes % mmap.PAGESIZE or page_bytes < 1:
            raise ValueError(f"page_bytes={page_bytes} must be a multiple of {mmap.PAGESIZE}")
        self.page_bytes = page_bytes
        self.num_pages = num_pages
        self.max_mappings = max_mappings()
        self._libc = _libc()
        self._file = os.memfd_create("xllm-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        weakref.finalize(self, os.close, self._file)
        os.ftruncate(self._file, num_pages * page_bytes)
        # Another process that maps it can be sure that all of it stays there.
        fcntl.fcntl(self._file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self._present = bytearray(num_pages)
        """1 for the pages that have memory."""
        self._preparing = Lock()
        self._workbench: int | None = None
        """Where pages are mapped to be prepared."""
        self._makes_huge = page_bytes % HUGE_PAGE_BYTES == 0

    @property
    def region(self) -> Region:
        """The pages as a file that can be shared: page n is at n * page_bytes."""
        return Region(file=self._file, num_bytes=self.num_pages * self.page_bytes)

    def reserve(self, num_bytes: int) -> int:
        size = num_bytes + self.page_bytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        start: int = _MAP_FAILED
        if size < 1 << 63:
            start = self._libc.mmap(None, size, _PROT_NONE, flags, -1, 0)
        if start == _MAP_FAILED:
            raise ValueError(
                f"the system refuses {num_bytes} bytes of addresses for the KV cache; lower max_num_seqs or"
                " max_model_len, or raise the limit on address space (ulimit -v)"
            )
        address = -(-start // self.page_bytes) * self.page_bytes
        # Off go the ends that only served the alignment.
        for begin, end in ((start, address), (address + num_bytes, start + size)):
            begin = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
            if begin < end:
                self._libc.munmap(begin, end - begin)
        return address

    def map(self, address: int, page: int) -> None:
        if self._present[page]:
            self._map(address, page)
        else:
            with self._preparing:
                self._map_first(address, page)

    def prepare(self, page: int) -> None:
        with self._preparing:
            if self._present[page]:
                return
            if self._workbench is None:
                self._workbench = self.reserve(self.page_bytes)
            self._map_first(self._workbench, page)
            self.unmap(self._workbench, self.page_bytes)

    def _map_first(self, address: int, page: int) -> None:
        """One page at a time: collapsing fails for a page that another thread maps meanwhile."""
        self._map(address, page)
        if not self._present[page]:
            if self._makes_huge:
                self._make_huge(address)
            self._present[page] = 1

    def _map(self, address: int, page: int) -> None:
        size = self.page_bytes
        flags = mmap.MAP_SHARED | _MAP_FIXED
        found = self._libc.mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, self._file, page * size)
        if found == _MAP_FAILED:
            code = ctypes.get_errno()
            raise OutOfMappingsError(
                f"the system refuses to map a page of the KV cache ({os.strerror(code)});"
                f" vm.max_map_count is {self.max_mappings + _OTHER_MAPPINGS}: raise it with sysctl"
            )
        # The access, not its value: it brings the page into the page table, off the step's path.
        ctypes.c_char.from_address(address).value  # noqa: B018

    def _make_huge(self, address: int) -> None:
        if self._libc.madvise(address, self.page_bytes, _MADV_COLLAPSE) == 0:
            return
        code = ctypes.get_errno()
        # These are about this page at this time; anything else will not change.
        if code not in (errno.EAGAIN, errno.EBUSY, errno.ENOMEM):
            self._makes_huge = False
            logger.warning(
                "the KV cache gets no huge pages (%s), attention over long contexts is slower; it needs Linux 6.1 and"
                " /sys/kernel/mm/transparent_hugepage/shmem_enabled other than deny",
                os.strerror(code),
            )

    def unmap(self, address: int, num_bytes: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
        if self._libc.mmap(address, num_bytes, _PROT_NONE, flags, -1, 0) == _MAP_FAILED:
            raise OutOfMappingsError(f"the system refuses to unmap ({os.strerror(ctypes.get_errno())})")

    def copy(self, page: int, address: int, num_bytes: int) -> None:
        # Reading the file leaves the source unmapped: a second mapping would count twice in the process's RSS.
        target = memoryview((ctypes.c_char * num_bytes).from_address(address)).cast("B")
        done = 0
        while done < num_bytes:
            done += os.preadv(self._file, [target[done:]], page * self.page_bytes + done)

    def read(self, page: int, offset: int, num_bytes: int) -> bytes:
        return os.pread(self._file, num_bytes, page * self.page_bytes + offset)

    def discard(self, page: int) -> None:
        flags = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
        if self._libc.fallocate(self._file, flags, page * self.page_bytes, self.page_bytes) == 0:
            self._present[page] = 0

    def tensor(self, address: int, num_bytes: int) -> Tensor:
        buffer = (ctypes.c_char * num_bytes).from_address(address)
        # The tensor keeps the buffer, the buffer keeps the addresses.
        weakref.finalize(buffer, self._libc.munmap, address, num_bytes)
        return torch.frombuffer(buffer, dtype=torch.uint8)


def max_mappings() -> int:
    """Mappings that the KV cache may have: vm.max_map_count without those of the rest of the process."""
    return max(int(Path("/proc/sys/vm/max_map_count").read_text()) - _OTHER_MAPPINGS, 0)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    pointer, size, number, offset = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64
    libc.mmap.restype = pointer
    libc.mmap.argtypes = [pointer, size, number, number, number, offset]
    libc.munmap.argtypes = [pointer, size]
    libc.madvise.argtypes = [pointer, size, number]
    libc.fallocate.argtypes = [number, number, offset, offset]
    return libc
