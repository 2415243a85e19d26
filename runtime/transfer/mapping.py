"""A region's file, mapped."""

import ctypes
import mmap
import os

from xllm_compile.runtime.transfer.transfer import Region

_HUGE_PAGE_BYTES = 2 << 20
_MAP_FIXED, _MAP_NORESERVE, _PROT_NONE = 0x10, 0x4000, 0
_MAP_FAILED = (1 << 64) - 1


class Mapping:
    """All of the region, at an address where its huge pages are mapped as such."""

    def __init__(self, region: Region, *, is_writable: bool) -> None:
        """Raises OSError."""
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
        self._libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.num_bytes = region.num_bytes
        # Python's mmap cannot be told where; the system would put a memfd anywhere.
        self._size = region.num_bytes + _HUGE_PAGE_BYTES
        self._start = self._map(
            None, self._size, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1
        )
        aligned = -(-self._start // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        access = mmap.PROT_READ | (mmap.PROT_WRITE if is_writable else 0)
        try:
            self.address = self._map(aligned, region.num_bytes, access, mmap.MAP_SHARED | _MAP_FIXED, region.file)
        except OSError:
            self.close()
            raise

    def _map(self, address: int | None, num_bytes: int, access: int, flags: int, file: int) -> int:
        found: int = self._libc.mmap(address, num_bytes, access, flags, file, 0)
        if found == _MAP_FAILED:
            code = ctypes.get_errno()
            raise OSError(code, f"mapping {num_bytes} bytes of KV for transfers: {os.strerror(code)}")
        return found

    def view(self, offset: int, num_bytes: int) -> memoryview:
        """Must not be used after close."""
        return memoryview((ctypes.c_char * num_bytes).from_address(self.address + offset)).cast("B")

    def close(self) -> None:
        """Nothing may touch the addresses from here on."""
        self._libc.munmap(self._start, self._size)
