import ctypes
import errno
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from xllm_compile.runtime.memory import cpu_memory
from xllm_compile.runtime.memory.cpu_memory import HUGE_PAGE_BYTES, CpuMemory
from xllm_compile.runtime.memory.virtual_memory import OutOfMappingsError

PAGE = 8192


def resident_bytes(address: int, num_bytes: int, key: str = "Rss") -> int:
    """Of the addresses, as /proc/self/smaps has it."""
    total, is_inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(part, 16) for part in match.groups())
            is_inside = address <= begin and end <= address + num_bytes
        elif is_inside and line.startswith(f"{key}:"):
            total += int(line.split()[1]) * 1024
    return total


def test_a_page_is_seen_wherever_it_is_mapped() -> None:
    memory = CpuMemory(num_pages=4, page_bytes=PAGE)
    address = memory.reserve(3 * PAGE)
    tensor = memory.tensor(address, 3 * PAGE).view(3, PAGE)
    for position, page in ((0, 2), (1, 0), (2, 2)):
        memory.map(address + position * PAGE, page)
    tensor[0] = 7
    assert (tensor[2] == 7).all() and not tensor[1].any()
    memory.map(address + PAGE, 2)
    assert (tensor[1] == 7).all()
    memory.map(address + PAGE, 0)
    assert not tensor[1].any()


def test_addresses_cost_nothing_until_a_page_is_mapped_and_unmapping_keeps_the_content() -> None:
    memory = CpuMemory(num_pages=2, page_bytes=PAGE)
    address = memory.reserve(1 << 40)
    tensor = memory.tensor(address, 1 << 40)
    assert resident_bytes(address, 1 << 40) == 0
    memory.map(address + 5 * PAGE, 1)
    tensor[5 * PAGE : 6 * PAGE] = 3
    assert resident_bytes(address, 1 << 40) == PAGE
    memory.unmap(address + 4 * PAGE, 2 * PAGE)
    assert resident_bytes(address, 1 << 40) == 0
    memory.map(address, 1)
    assert (tensor[:PAGE] == 3).all()


def test_copy_takes_the_beginning_of_an_unmapped_page() -> None:
    memory = CpuMemory(num_pages=2, page_bytes=PAGE)
    address = memory.reserve(PAGE)
    tensor = memory.tensor(address, PAGE)
    memory.map(address, 0)
    tensor[:] = torch.arange(PAGE) % 251
    content = tensor.clone()
    memory.map(address, 1)
    memory.copy(0, address, 5000)
    assert torch.equal(tensor[:5000], content[:5000]) and not tensor[5000:].any()


def test_a_discarded_page_gives_its_memory_back() -> None:
    memory = CpuMemory(num_pages=1, page_bytes=PAGE)
    address = memory.reserve(PAGE)
    tensor = memory.tensor(address, PAGE)
    memory.map(address, 0)
    tensor[:] = 1
    memory.discard(0)
    assert resident_bytes(address, PAGE) == 0
    memory.map(address, 0)
    assert not tensor.any()


def test_pages_of_the_right_size_become_huge_or_stay_small_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    memory = CpuMemory(num_pages=1, page_bytes=HUGE_PAGE_BYTES)
    address = memory.reserve(HUGE_PAGE_BYTES)
    tensor = memory.tensor(address, HUGE_PAGE_BYTES)
    memory.map(address, 0)
    huge = resident_bytes(address, HUGE_PAGE_BYTES, "ShmemPmdMapped")
    assert huge == HUGE_PAGE_BYTES or "no huge pages" in caplog.text
    tensor[:] = 1
    assert resident_bytes(address, HUGE_PAGE_BYTES) == HUGE_PAGE_BYTES


def test_a_refused_mapping_names_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = CpuMemory(num_pages=1, page_bytes=PAGE)
    address = memory.reserve(PAGE)

    class Refusing:
        """The system at its limit of mappings."""

        def mmap(self, *_: object) -> int:
            ctypes.set_errno(errno.ENOMEM)
            return cpu_memory._MAP_FAILED

    monkeypatch.setattr(memory, "_libc", Refusing())
    with pytest.raises(OutOfMappingsError, match=r"Cannot allocate memory.*vm.max_map_count is \d+: raise it"):
        memory.map(address, 0)


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="page_bytes=5000 must be a multiple of 4096"):
        CpuMemory(num_pages=1, page_bytes=5000)
    memory = CpuMemory(num_pages=1, page_bytes=PAGE)
    for num_bytes in (1 << 60, 1 << 70):
        with pytest.raises(ValueError, match=f"refuses {num_bytes} bytes of addresses.*lower max_num_seqs"):
            memory.reserve(num_bytes)


def test_addresses_go_back_with_the_last_tensor() -> None:
    memory = CpuMemory(num_pages=1, page_bytes=PAGE)
    address = memory.reserve(1 << 30)
    view = memory.tensor(address, 1 << 30)[:4].view(2, 2)
    memory.map(address, 0)
    view[0] = 5
    assert resident_bytes(address, 1 << 30) > 0
    del view
    assert resident_bytes(address, 1 << 30) == 0


def test_a_prepared_page_has_its_memory_and_keeps_its_content() -> None:
    memory = CpuMemory(num_pages=4, page_bytes=PAGE)
    memory.prepare(2)
    assert os.fstat(memory._file).st_blocks > 0
    address = memory.reserve(PAGE)
    tensor = memory.tensor(address, PAGE)
    memory.map(address, 2)
    tensor[:] = 9
    memory.prepare(2)
    memory.discard(1)
    assert (tensor == 9).all()
    memory.discard(2)
    memory.prepare(2)
    memory.map(address, 2)
    assert not tensor.any()


def test_pages_are_prepared_while_others_are_mapped() -> None:
    memory = CpuMemory(num_pages=64, page_bytes=HUGE_PAGE_BYTES)
    address = memory.reserve(64 * HUGE_PAGE_BYTES)
    tensor = memory.tensor(address, 64 * HUGE_PAGE_BYTES).view(64, -1)
    with ThreadPoolExecutor(2) as pool:
        preparing = [pool.submit(memory.prepare, page) for page in range(64)]
        for page in range(64):
            memory.map(address + page * HUGE_PAGE_BYTES, page)
            tensor[page, :8] = page
        for each in preparing:
            each.result()
    assert all((tensor[page, :8] == page).all() and not tensor[page, 8:].any() for page in range(64))
