import dataclasses
import mmap
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from xllm_compile.runtime.kv_cache import KVCache, KVCacheConfig, KVCacheFullError, whole_pages

# 64 bytes per token and layer: one page is 64 tokens, and a slot of 100 tokens shares its pages with its neighbours.
CONFIG = KVCacheConfig(
    num_layers=2,
    num_kv_heads=1,
    head_dim=8,
    dtype=torch.float32,
    max_model_len=100,
    num_slots=6,
    kv_memory_bytes=250 * 128,
)


def resident_pages(cache: KVCache) -> int:
    """Pages of the cache that the kernel has backed with memory, read from /proc/self/smaps."""
    addresses = {layer.data_ptr() for layer in cache.layers}
    total, is_ours = 0, False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                begin, end = (int(part, 16) for part in match.groups())
                is_ours = any(begin <= address < end for address in addresses)
            elif is_ours and line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024 // mmap.PAGESIZE
    return total


def fill(cache: KVCache, slot: int, begin: int, end: int, value: float) -> None:
    for layer in cache.layers:
        layer[slot, begin:end] = value


def test_config_derives_the_budget_in_tokens() -> None:
    assert CONFIG.bytes_per_token == 128
    assert CONFIG.total_tokens == 250
    assert dataclasses.replace(CONFIG, kv_memory_bytes=10**9).total_tokens == 600


def test_budget_below_one_sequence_names_numbers_and_next_step() -> None:
    with pytest.raises(ValueError, match=r"holds 99 tokens of 128 bytes.*needs 12800 bytes; raise kv_memory_bytes"):
        dataclasses.replace(CONFIG, kv_memory_bytes=99 * 128)
    with pytest.raises(ValueError, match="num_slots=0 must be at least 1"):
        dataclasses.replace(CONFIG, num_slots=0)


def test_addresses_that_cannot_be_reserved_name_the_next_step() -> None:
    with pytest.raises(ValueError, match=r"refuses \d+ bytes of addresses.*lower num_slots or max_model_len"):
        KVCache(dataclasses.replace(CONFIG, num_slots=2**50))


def test_layers_have_the_agreed_shape_and_start_as_zeros() -> None:
    cache = KVCache(CONFIG)
    assert [tuple(layer.shape) for layer in cache.layers] == [(6, 100, 2, 1, 8)] * 2
    assert all(layer.is_contiguous() and layer.dtype == torch.float32 and not layer.any() for layer in cache.layers)
    half = KVCache(dataclasses.replace(CONFIG, dtype=torch.bfloat16))
    assert half.layers[1].dtype == torch.bfloat16


def test_memory_arrives_on_touch() -> None:
    # 4 GiB of addresses per layer, more than a machine for tests should have to give.
    config = dataclasses.replace(CONFIG, max_model_len=2**20, num_slots=64, kv_memory_bytes=2**20 * 128)
    cache = KVCache(config)
    before = resident_pages(cache)
    slot = cache.allocate()
    assert cache.extend(slot, 128)
    fill(cache, slot, 0, 128, 1.0)
    assert resident_pages(cache) - before == 2 * 2


def test_extend_stops_at_the_budget_and_at_the_slot() -> None:
    cache = KVCache(CONFIG)
    slots = [cache.allocate() for _ in range(3)]
    assert cache.extend(slots[0], 100) and cache.extend(slots[1], 100)
    assert cache.can_append(50) and not cache.can_append(51)
    assert not cache.extend(slots[2], 51)
    assert cache.used_tokens == 200
    assert cache.extend(slots[2], 50)
    with pytest.raises(ValueError, match="would hold 101 tokens, max_model_len=100"):
        cache.extend(slots[0], 1)


def test_no_idle_slot_is_a_named_error() -> None:
    cache = KVCache(CONFIG)
    for _ in range(6):
        cache.allocate()
    with pytest.raises(KVCacheFullError, match="all 6 KV slots"):
        cache.allocate()


def test_reuse_prefers_the_slot_with_most_pages_and_keeps_them() -> None:
    cache = KVCache(CONFIG)
    first, second = cache.allocate(), cache.allocate()
    cache.extend(first, 40)
    cache.extend(second, 90)
    cache.free(first)
    cache.free(second)
    assert cache.used_tokens == 0
    assert cache.touched_tokens == 130
    assert cache.allocate() == second
    assert cache.extend(second, 90)
    assert cache.touched_tokens == 130


def test_idle_pages_go_back_smallest_first_when_the_budget_is_needed() -> None:
    cache = KVCache(CONFIG)
    small, large, live = (cache.allocate() for _ in range(3))
    for slot, count in ((small, 30), (large, 100), (live, 100)):
        cache.extend(slot, count)
        fill(cache, slot, 0, count, slot + 1.0)
    cache.free(small)
    cache.free(large)
    other = cache.allocate()
    assert other == large
    cache.free(other)
    newcomers = [cache.allocate(), cache.allocate()]
    assert newcomers == [large, small]
    assert cache.extend(large, 100) and cache.touched_tokens == 230
    assert cache.extend(small, 50) and cache.touched_tokens == 250
    assert all((layer[live] == live + 1.0).all() for layer in cache.layers)


def test_released_pages_really_leave_memory() -> None:
    config = dataclasses.replace(CONFIG, max_model_len=6400, num_slots=2, kv_memory_bytes=6400 * 128)
    cache = KVCache(config)
    first, second = cache.allocate(), cache.allocate()
    cache.extend(first, 6400)
    fill(cache, first, 0, 6400, 1.0)
    assert resident_pages(cache) == 2 * 100
    cache.free(first)
    cache.extend(second, 64)
    fill(cache, second, 0, 64, 2.0)
    assert resident_pages(cache) == 2 * 1
    assert all(not layer[first].any() for layer in cache.layers)


def test_pages_beyond_the_length_of_a_live_slot_go_back_too() -> None:
    cache = KVCache(CONFIG)
    long, other = cache.allocate(), cache.allocate()
    cache.extend(long, 100)
    cache.extend(other, 100)
    fill(cache, other, 0, 100, 2.0)
    cache.free(long)
    short = cache.allocate()
    assert short == long
    cache.extend(short, 10)
    fill(cache, short, 0, 10, 1.0)
    third = cache.allocate()
    assert cache.extend(third, 100)
    assert cache.touched_tokens <= cache.total_tokens
    assert all((layer[short, :10] == 1.0).all() and (layer[other] == 2.0).all() for layer in cache.layers)


@given(st.integers(0, 50_000), st.integers(0, 50_000))
def test_whole_pages_lie_inside_and_lose_less_than_two_pages(begin: int, size: int) -> None:
    first, last = whole_pages(begin, begin + size)
    assert first % mmap.PAGESIZE == 0 and first <= last
    if first < last:
        assert last % mmap.PAGESIZE == 0
        assert begin <= first and last <= begin + size
    assert size - (last - first) < 2 * mmap.PAGESIZE


class SlotMachine(RuleBasedStateMachine):
    """Any order of operations keeps the budget, and no live slot loses what was written into it."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCache(CONFIG)
        self.lengths: dict[int, int] = {}
        self.marks: dict[int, float] = {}
        self.num_allocated = 0

    @precondition(lambda self: len(self.lengths) < CONFIG.num_slots)
    @rule()
    def allocate(self) -> None:
        slot = self.cache.allocate()
        assert slot not in self.lengths
        self.num_allocated += 1
        self.lengths[slot], self.marks[slot] = 0, float(self.num_allocated)

    @precondition(lambda self: self.lengths)
    @rule(data=st.data(), count=st.integers(1, 100))
    def extend(self, data: st.DataObject, count: int) -> None:
        slot = data.draw(st.sampled_from(sorted(self.lengths)))
        count = min(count, CONFIG.max_model_len - self.lengths[slot])
        fits = sum(self.lengths.values()) + count <= CONFIG.total_tokens
        assert self.cache.can_append(count) == fits
        assert self.cache.extend(slot, count) == fits
        if fits:
            begin, self.lengths[slot] = self.lengths[slot], self.lengths[slot] + count
            fill(self.cache, slot, begin, begin + count, self.marks[slot])

    @precondition(lambda self: self.lengths)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.lengths)))
        self.cache.free(slot)
        del self.lengths[slot], self.marks[slot]

    @invariant()
    def budget_holds_and_contents_stay(self) -> None:
        assert self.cache.used_tokens == sum(self.lengths.values()) <= self.cache.total_tokens
        assert self.cache.used_tokens <= self.cache.touched_tokens <= self.cache.total_tokens
        assert self.cache.num_free_slots == CONFIG.num_slots - len(self.lengths)
        for slot, length in self.lengths.items():
            assert self.cache.length(slot) == length
            assert all((layer[slot, :length] == self.marks[slot]).all() for layer in self.cache.layers)


TestSlotMachine = SlotMachine.TestCase
TestSlotMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
