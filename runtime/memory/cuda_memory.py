"""KV pages of an NVIDIA GPU: cuMemCreate, cuMemMap and their neighbours, called in the driver's own library."""

import ctypes

import torch

from xllm_compile.runtime.memory.device_memory import DeviceMemory, Library

# cuda.h
_PINNED, _ON_DEVICE, _READ_WRITE, _MINIMUM = 1, 1, 3, 0


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _AllocationProp(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("requested_handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32_handle_meta_data", ctypes.c_void_p),
        ("alloc_flags", ctypes.c_uint8 * 8),
    )


class _AccessDesc(ctypes.Structure):
    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


class CudaDriver:
    """Of the device that is current in torch: its context must be up."""

    def __init__(self, device: int = 0, library: Library | None = None) -> None:
        self.device = torch.device("cuda", device)
        self._library = library or Library(["libcuda.so.1", "libcuda.so"], "install the NVIDIA driver")
        location = _Location(_ON_DEVICE, device)
        self._prop = _AllocationProp(type=_PINNED, location=location)
        self._access = _AccessDesc(location, _READ_WRITE)

    def granularity(self) -> int:
        found = ctypes.c_size_t()
        self._library.call(
            "cuMemGetAllocationGranularity", ctypes.byref(found), ctypes.byref(self._prop), ctypes.c_int(_MINIMUM)
        )
        return found.value

    def reserve(self, num_bytes: int, alignment: int) -> int:
        found = ctypes.c_uint64()
        size, align = ctypes.c_size_t(num_bytes), ctypes.c_size_t(alignment)
        self._library.call(
            "cuMemAddressReserve", ctypes.byref(found), size, align, ctypes.c_uint64(0), ctypes.c_uint64(0)
        )
        return found.value

    def create(self, num_bytes: int) -> int:
        found = ctypes.c_uint64()
        size, prop = ctypes.c_size_t(num_bytes), ctypes.byref(self._prop)
        self._library.call("cuMemCreate", ctypes.byref(found), size, prop, ctypes.c_uint64(0))
        return found.value

    def destroy(self, handle: int) -> None:
        self._library.call("cuMemRelease", ctypes.c_uint64(handle))

    def map(self, address: int, num_bytes: int, handle: int) -> None:
        at, size, none = ctypes.c_uint64(address), ctypes.c_size_t(num_bytes), ctypes.c_size_t(0)
        self._library.call("cuMemMap", at, size, none, ctypes.c_uint64(handle), ctypes.c_uint64(0))
        self._library.call("cuMemSetAccess", at, size, ctypes.byref(self._access), ctypes.c_size_t(1))

    def unmap(self, address: int, num_bytes: int) -> None:
        self._library.call("cuMemUnmap", ctypes.c_uint64(address), ctypes.c_size_t(num_bytes))

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        size = ctypes.c_size_t(num_bytes)
        self._library.call("cuMemcpyDtoD_v2", ctypes.c_uint64(target), ctypes.c_uint64(source), size)

    def to_host(self, target: int, source: int, num_bytes: int) -> None:
        size = ctypes.c_size_t(num_bytes)
        self._library.call("cuMemcpyDtoH_v2", ctypes.c_void_p(target), ctypes.c_uint64(source), size)


def cuda_memory(num_pages: int, page_bytes: int, device: int = 0) -> DeviceMemory:
    """Raises DriverError without a driver, ValueError when page_bytes is no multiple of what the device maps."""
    return DeviceMemory(num_pages, page_bytes, CudaDriver(device))
