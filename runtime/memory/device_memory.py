"""Pages of an accelerator, by its driver's calls for virtual memory: what CUDA and NPU have in common."""

import ctypes
from collections.abc import Sequence
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor

# Drivers name no limit on mappings.
_MAX_MAPPINGS = 1 << 40


class DriverError(RuntimeError):
    """The driver's library is missing, or refused a call; the message names it."""


class Driver(Protocol):
    """One driver's calls. All raise DriverError."""

    @property
    def device(self) -> torch.device: ...
    def granularity(self) -> int: ...
    def reserve(self, num_bytes: int, alignment: int) -> int: ...
    def create(self, num_bytes: int) -> int: ...
    def destroy(self, handle: int) -> None: ...
    def map(self, address: int, num_bytes: int, handle: int) -> None: ...
    def unmap(self, address: int, num_bytes: int) -> None: ...
    def copy(self, target: int, source: int, num_bytes: int) -> None: ...
    def to_host(self, target: int, source: int, num_bytes: int) -> None: ...


class DeviceMemory:
    """See VirtualMemory. A page's memory is created when it is first mapped; a window shows each page for copies."""

    def __init__(self, num_pages: int, page_bytes: int, driver: Driver) -> None:
        """Raises ValueError when the device does not map pages of this size, DriverError."""
        granularity = driver.granularity()
        if page_bytes % granularity:
            raise ValueError(f"page_bytes={page_bytes} must be a multiple of {granularity}, as the device maps memory")
        self.page_bytes = page_bytes
        self.num_pages = num_pages
        self.max_mappings = _MAX_MAPPINGS
        self._driver = driver
        self._window = driver.reserve(num_pages * page_bytes, page_bytes)
        self._creating = Lock()
        self._handles: dict[int, int] = {}
        self._mapped: set[int] = set()

    def reserve(self, num_bytes: int) -> int:
        try:
            return self._driver.reserve(num_bytes, self.page_bytes)
        except DriverError as err:
            raise ValueError(
                f"the device refuses {num_bytes} bytes of addresses for the KV cache ({err}); lower max_num_seqs or"
                " max_model_len"
            ) from err

    def map(self, address: int, page: int) -> None:
        if address in self._mapped:
            self._driver.unmap(address, self.page_bytes)
        self.prepare(page)
        self._driver.map(address, self.page_bytes, self._handles[page])
        self._mapped.add(address)

    def prepare(self, page: int) -> None:
        with self._creating:
            if page not in self._handles:
                self._handles[page] = self._driver.create(self.page_bytes)
                self._driver.map(self._window + page * self.page_bytes, self.page_bytes, self._handles[page])

    def unmap(self, address: int, num_bytes: int) -> None:
        for each in range(address, address + num_bytes, self.page_bytes):
            if each in self._mapped:
                self._driver.unmap(each, self.page_bytes)
                self._mapped.remove(each)

    def copy(self, page: int, address: int, num_bytes: int) -> None:
        self._driver.copy(address, self._window + page * self.page_bytes, num_bytes)

    def read(self, page: int, offset: int, num_bytes: int) -> bytes:
        target = ctypes.create_string_buffer(num_bytes)
        source = self._window + page * self.page_bytes + offset
        self._driver.to_host(ctypes.addressof(target), source, num_bytes)
        return target.raw

    def discard(self, page: int) -> None:
        handle = self._handles.pop(page, None)
        if handle is not None:
            self._driver.unmap(self._window + page * self.page_bytes, self.page_bytes)
            self._driver.destroy(handle)

    def tensor(self, address: int, num_bytes: int) -> Tensor:
        storage = torch._C._construct_storage_from_data_pointer(address, self._driver.device, num_bytes)
        return torch.empty(0, dtype=torch.uint8, device=self._driver.device).set_(storage)


class Library:
    """A driver's shared library, whose functions return 0 or an error."""

    def __init__(self, names: Sequence[str], needed: str) -> None:
        """The first of ``names`` that is there. Raises DriverError saying what is ``needed``."""
        for name in names:
            try:
                self._library: Any = ctypes.CDLL(name)
                return
            except OSError:
                continue
        raise DriverError(f"none of {', '.join(names)} can be loaded: {needed}")

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            raise DriverError(f"{name} failed with error {code}")
