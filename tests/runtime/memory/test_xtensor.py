import threading

import pytest
import torch
from torch import Tensor

from xllm_compile.runtime.memory.cpu_memory import CpuMemory
from xllm_compile.runtime.memory.page_ops import PageOps, replay, run_copies
from xllm_compile.runtime.memory.virtual_memory import OutOfMappingsError
from xllm_compile.runtime.memory.xtensor import XTensor

PAGE = 4096


def make_xtensor(num_slots: int = 3, pages_per_slot: int = 4, num_pages: int = 8) -> XTensor:
    return XTensor(CpuMemory(num_pages, PAGE), num_slots, pages_per_slot * PAGE - 100)


def page_of(xtensor: XTensor, slot: int, position: int) -> Tensor:
    return xtensor.ranges[slot, position * PAGE : (position + 1) * PAGE]


def test_tables_say_what_is_mapped() -> None:
    xtensor = make_xtensor()
    assert (xtensor.pages_per_slot, tuple(xtensor.ranges.shape)) == (4, (3, 4 * PAGE))
    for slot, position, page in ((0, 0, 5), (0, 2, 1), (2, 3, 5)):
        xtensor.map(slot, position, page)
    page_of(xtensor, 0, 0).fill_(9)
    assert (page_of(xtensor, 2, 3) == 9).all()
    assert list(xtensor.mapped(0)) == [(0, 5), (2, 1)] and xtensor.num_mapped(0) == 2
    assert xtensor.places(5) == [(0, 0), (2, 3)] and xtensor.places(7) == []
    xtensor.map(0, 0, 6)
    assert xtensor.places(5) == [(2, 3)] and xtensor.num_mappings == 3
    xtensor.unmap(0, 0, 4)
    assert list(xtensor.mapped(0)) == [] and xtensor.num_mappings == 1


def test_mapping_ahead_is_done_by_another_thread_before_settle_returns() -> None:
    threads: list[str] = []
    gate = threading.Event()

    class Slow(CpuMemory):
        def map(self, address: int, page: int) -> None:
            gate.wait()
            threads.append(threading.current_thread().name)
            super().map(address, page)

    xtensor = XTensor(Slow(2, PAGE), 1, 2 * PAGE)
    xtensor.map(0, 1, 0, is_ahead=True)
    assert xtensor.page(0, 1) == 0 and not threads
    gate.set()
    xtensor.settle(0, 1)
    assert threads == ["xllm-premap_0"]
    page_of(xtensor, 0, 1).fill_(1)
    xtensor.close()


def test_what_goes_wrong_ahead_of_time_is_told_when_the_page_is_needed() -> None:
    class Full(CpuMemory):
        def map(self, address: int, page: int) -> None:
            raise OutOfMappingsError("no more")

    xtensor = XTensor(Full(1, PAGE), 1, PAGE)
    xtensor.map(0, 0, 0, is_ahead=True)
    with pytest.raises(OutOfMappingsError, match="no more"):
        xtensor.settle(0, 0)


def test_another_rank_replays_what_was_done() -> None:
    leader, follower, ops = make_xtensor(), make_xtensor(), PageOps()
    for slot, position, page in ((0, 0, 3), (0, 1, 4), (1, 0, 5)):
        ops.map(slot, position, page)
        leader.map(slot, position, page)
    for xtensor in (leader, follower):
        # The first step, on each rank with content of its own.
        if xtensor is follower:
            replay(ops.take(), follower)
        page_of(xtensor, 0, 0).copy_(torch.arange(PAGE) % (200 if xtensor is leader else 100))
    ops.unmap(0, 1, 2)
    leader.unmap(0, 1, 2)
    ops.copy(3, 1, 0, 1000)
    second = ops.take()
    assert len(ops.take()) == 0
    run_copies(second, leader)
    replay(second, follower)
    for xtensor in (leader, follower):
        assert list(xtensor.mapped(0)) == [(0, 3)]
        assert torch.equal(page_of(xtensor, 1, 0)[:1000], page_of(xtensor, 0, 0)[:1000])
        assert not page_of(xtensor, 1, 0)[1000:].any()
