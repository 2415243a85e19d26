import os
from pathlib import Path

import pytest

from tests.runtime.memory.test_cpu_memory import resident_bytes
from xllm_compile.runtime.memory.cpu_memory import HUGE_PAGE_BYTES, CpuMemory
from xllm_compile.runtime.transfer.mapping import Mapping
from xllm_compile.runtime.transfer.transfer import Region


def test_pages_are_where_the_cache_has_them_and_huge_ones_stay_huge():
    memory = CpuMemory(num_pages=3, page_bytes=HUGE_PAGE_BYTES)
    address = memory.reserve(HUGE_PAGE_BYTES)
    tensor = memory.tensor(address, HUGE_PAGE_BYTES)
    memory.map(address, 1)
    tensor[:] = 7
    mapping = Mapping(memory.region, is_writable=True)
    view = mapping.view(HUGE_PAGE_BYTES, HUGE_PAGE_BYTES)
    assert view[0] == view[-1] == 7
    view[5] = 9
    assert tensor[5] == 9
    huge = resident_bytes(address, HUGE_PAGE_BYTES, "ShmemPmdMapped")
    assert resident_bytes(mapping.address, mapping.num_bytes, "ShmemPmdMapped") == huge
    # Pages without memory have none by being mapped.
    assert os.fstat(memory.region.file).st_blocks * 512 == HUGE_PAGE_BYTES
    mapping.close()


def test_a_file_that_cannot_be_mapped_is_an_error_and_leaves_no_addresses():
    read_end, write_end = os.pipe()
    size = 1 << 30
    before = _address_space_bytes()
    with pytest.raises(OSError, match=f"mapping {size} bytes of KV for transfers: "):
        Mapping(Region(file=read_end, num_bytes=size), is_writable=True)
    assert _address_space_bytes() < before + size
    os.close(read_end)
    os.close(write_end)


def _address_space_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
