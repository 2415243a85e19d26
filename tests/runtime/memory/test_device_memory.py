"""The order and arguments of driver calls, on libraries that record them. No kernel of theirs runs here."""

import ctypes
from typing import Any

import pytest

from xllm_compile.runtime.memory.cuda_memory import CudaDriver
from xllm_compile.runtime.memory.device_memory import DeviceMemory, Driver, DriverError, Library
from xllm_compile.runtime.memory.npu_memory import NpuDriver

PAGE = 2 << 20
_NEW = {"cuMemAddressReserve": 0, "cuMemCreate": 0, "aclrtReserveMemAddress": 0, "aclrtMallocPhysical": 0}
_GRANULARITY_AT = {"cuMemGetAllocationGranularity": 0, "aclrtMemGetAllocationGranularity": 2}


class Recorder(Library):
    """Answers as a driver would, and keeps the plain values of each call."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.failing = ""
        self._next = 0

    def call(self, name: str, *arguments: Any) -> None:
        if name == self.failing:
            raise DriverError(f"{name} failed with error 2")
        if name in _NEW:
            self._next += 1
            arguments[0]._obj.value = self._next << 30
        if name in _GRANULARITY_AT:
            arguments[_GRANULARITY_AT[name]]._obj.value = PAGE
        values = [argument.value for argument in arguments if isinstance(argument, ctypes._SimpleCData)]
        self.calls.append((name, *values))

    def take(self) -> list[tuple[Any, ...]]:
        calls, self.calls = self.calls, []
        return calls


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (CudaDriver, ("cuMemCreate", "cuMemMap", "cuMemUnmap", "cuMemRelease", "cuMemcpyDtoD_v2")),
        (NpuDriver, ("aclrtMallocPhysical", "aclrtMapMem", "aclrtUnmapMem", "aclrtFreePhysical", "aclrtMemcpy")),
    ],
)
def test_a_page_is_created_once_mapped_anywhere_and_released(kind: Any, names: tuple[str, ...]) -> None:
    create, map_, unmap, release, copy = names
    library = Recorder()
    driver: Driver = kind(library=library)
    memory = DeviceMemory(4, PAGE, driver)
    window = memory._window
    address = memory.reserve(4 * PAGE)
    library.take()
    memory.map(address, 3)
    memory.map(address + PAGE, 3)
    calls = [call for call in library.take() if call[0] != "cuMemSetAccess"]
    assert [call[0] for call in calls] == [create, map_, map_, map_]
    assert [call[1] for call in calls[1:]] == [window + 3 * PAGE, address, address + PAGE]
    assert len({call[4] for call in calls[1:]}) == 1
    # What is mapped there goes first.
    memory.map(address, 1)
    calls = [call for call in library.take() if call[0] != "cuMemSetAccess"]
    assert [call[0] for call in calls] == [unmap, create, map_, map_]
    memory.copy(3, address, 1000)
    assert library.take()[0][:2] == (copy, address)
    memory.unmap(address, 4 * PAGE)
    assert [call[:2] for call in library.take()] == [(unmap, address), (unmap, address + PAGE)]
    memory.discard(3)
    memory.discard(0)
    assert [call[0] for call in library.take()] == [unmap, release]


def test_cuda_mappings_are_opened_for_access() -> None:
    library = Recorder()
    memory = DeviceMemory(1, PAGE, CudaDriver(library=library))
    address = memory.reserve(PAGE)
    library.take()
    memory.map(address, 0)
    assert [call[0] for call in library.take()] == ["cuMemCreate", *["cuMemMap", "cuMemSetAccess"] * 2]


@pytest.mark.parametrize("kind", [CudaDriver, NpuDriver])
def test_errors_name_what_was_asked(kind: Any) -> None:
    library = Recorder()
    with pytest.raises(ValueError, match=r"page_bytes=4096 must be a multiple of 2097152"):
        DeviceMemory(1, 4096, kind(library=library))
    memory = DeviceMemory(1, PAGE, kind(library=library))
    library.failing = "cuMemAddressReserve" if kind is CudaDriver else "aclrtReserveMemAddress"
    with pytest.raises(ValueError, match=r"refuses 1024 bytes of addresses.*error 2.*lower max_num_seqs"):
        memory.reserve(1024)


def test_a_missing_driver_names_what_to_install() -> None:
    with pytest.raises(DriverError, match=r"none of libnothing.so.1 can be loaded: install it"):
        Library(["libnothing.so.1"], "install it")
