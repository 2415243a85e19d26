"""KV pages of an Ascend NPU: aclrtMallocPhysical, aclrtMapMem and their neighbours, called in CANN's library."""

import ctypes

import torch

from xllm_compile.runtime.memory.device_memory import DeviceMemory, Library

# acl_rt.h
_NO_HANDLE_TYPE, _PINNED, _HBM_HUGE, _ON_DEVICE, _MINIMUM = 0, 0, 4, 1, 0
_DEVICE_TO_HOST, _DEVICE_TO_DEVICE = 2, 3


class _Location(ctypes.Structure):
    _fields_ = (("id", ctypes.c_uint32), ("type", ctypes.c_int))


class _PhysicalMemProp(ctypes.Structure):
    _fields_ = (
        ("handle_type", ctypes.c_int),
        ("allocation_type", ctypes.c_int),
        ("mem_attr", ctypes.c_int),
        ("location", _Location),
        ("reserve", ctypes.c_uint64),
    )


class NpuDriver:
    """Of the device that is current in torch_npu: its context must be up."""

    def __init__(self, device: int = 0, library: Library | None = None) -> None:
        self._library = library or Library(["libascendcl.so"], "install CANN and source its set_env.sh")
        self._device = device
        self._prop = _PhysicalMemProp(_NO_HANDLE_TYPE, _PINNED, _HBM_HUGE, _Location(device, _ON_DEVICE), 0)

    @property
    def device(self) -> torch.device:
        """torch knows the name once torch_npu is imported."""
        return torch.device("npu", self._device)

    def granularity(self) -> int:
        found = ctypes.c_size_t()
        prop = ctypes.byref(self._prop)
        self._library.call("aclrtMemGetAllocationGranularity", prop, ctypes.c_int(_MINIMUM), ctypes.byref(found))
        return found.value

    def reserve(self, num_bytes: int, alignment: int) -> int:
        # CANN takes no alignment but its own: room is left for ours.
        found = ctypes.c_void_p()
        size, none = ctypes.c_size_t(num_bytes + alignment), ctypes.c_size_t(0)
        self._library.call(
            "aclrtReserveMemAddress", ctypes.byref(found), size, none, ctypes.c_void_p(), ctypes.c_uint64(0)
        )
        return -(-(found.value or 0) // alignment) * alignment

    def create(self, num_bytes: int) -> int:
        found = ctypes.c_void_p()
        size, prop = ctypes.c_size_t(num_bytes), ctypes.byref(self._prop)
        self._library.call("aclrtMallocPhysical", ctypes.byref(found), size, prop, ctypes.c_uint64(0))
        return found.value or 0

    def destroy(self, handle: int) -> None:
        self._library.call("aclrtFreePhysical", ctypes.c_void_p(handle))

    def map(self, address: int, num_bytes: int, handle: int) -> None:
        at, size, none = ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), ctypes.c_size_t(0)
        self._library.call("aclrtMapMem", at, size, none, ctypes.c_void_p(handle), ctypes.c_uint64(0))

    def unmap(self, address: int, num_bytes: int) -> None:
        # It unmaps what was mapped at the address, whole.
        self._library.call("aclrtUnmapMem", ctypes.c_void_p(address))

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        self._memcpy(target, source, num_bytes, _DEVICE_TO_DEVICE)

    def to_host(self, target: int, source: int, num_bytes: int) -> None:
        self._memcpy(target, source, num_bytes, _DEVICE_TO_HOST)

    def _memcpy(self, target: int, source: int, num_bytes: int, kind: int) -> None:
        size = ctypes.c_size_t(num_bytes)
        to, of = ctypes.c_void_p(target), ctypes.c_void_p(source)
        self._library.call("aclrtMemcpy", to, size, of, size, ctypes.c_int(kind))


def npu_memory(num_pages: int, page_bytes: int, device: int = 0) -> DeviceMemory:
    """Raises DriverError without CANN, ValueError when page_bytes is no multiple of what the device maps."""
    return DeviceMemory(num_pages, page_bytes, NpuDriver(device))
