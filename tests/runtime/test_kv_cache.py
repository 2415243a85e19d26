import dataclasses
import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from xllm_compile.runtime.kv_cache import KVCache, KVCacheFullError
from xllm_compile.runtime.kv_cache_config import KVCacheConfig
from xllm_compile.runtime.memory.cpu_memory import CpuMemory
from xllm_compile.runtime.memory.page_ops import run_copies
from xllm_compile.runtime.memory.prefix_cache import BlockChain

# 192 bytes per token: a page of 4096 bytes holds 21.3 tokens, so blocks of 4 tokens share pages and some straddle two.
CONFIG = KVCacheConfig(
    num_layers=3,
    num_kv_heads=1,
    head_dim=8,
    dtype=torch.float32,
    max_model_len=100,
    num_slots=6,
    kv_memory_bytes=12 * 4096,
    block_tokens=4,
    page_bytes=4096,
)


def chain_of(cache: KVCache, tokens: list[int]) -> BlockChain:
    chain = cache.new_chain()
    chain.update(tokens)
    return chain


def settle(cache: KVCache) -> None:
    """What the device does before a step."""
    run_copies(cache.ops.take(), cache.xtensor)


def start(cache: KVCache, tokens: list[int]) -> int:
    """A slot that holds the tokens: those that were not cached are written, as a step does."""
    slot = cache.allocate(chain_of(cache, tokens), len(tokens), len(tokens))
    cached = cache.length(slot)
    assert cache.extend(slot, len(tokens) - cached)
    settle(cache)
    write(cache, slot, tokens, cached)
    cache.commit(slot, chain_of(cache, tokens), len(tokens))
    return slot


def write(cache: KVCache, slot: int, tokens: list[int], begin: int) -> None:
    values = torch.tensor(tokens[begin:], dtype=torch.float32).view(-1, 1, 1, 1)
    for index, layer in enumerate(cache.layers):
        layer[slot, begin : len(tokens)] = values + 1000 * index


def read(cache: KVCache, slot: int, num_tokens: int) -> list[int]:
    first, *others = (layer[slot, :num_tokens] - 1000 * index for index, layer in enumerate(cache.layers))
    assert all(torch.equal(first, other) for other in others)
    assert (first == first[:, :1, :1, :1]).all()
    found: Tensor = first[:, 0, 0, 0]
    return [int(value) for value in found.tolist()]


def test_the_memory_of_the_next_free_pages_is_there_before_they_are_taken() -> None:
    cache = KVCache(CONFIG)
    memory = cache.xtensor.memory
    assert isinstance(memory, CpuMemory)
    start(cache, list(range(30)))
    # Two pages are written, one is mapped ahead or not; the threads have done what they were asked for.
    cache.xtensor._preparer.submit(lambda: None).result()
    assert sum(memory._present) == CONFIG.num_pages
    cache.give_back()
    cache.close()


def test_pretouch_has_all_of_the_memory_at_once() -> None:
    cache = KVCache(dataclasses.replace(CONFIG, pretouch=True))
    memory = cache.xtensor.memory
    assert isinstance(memory, CpuMemory) and sum(memory._present) == CONFIG.num_pages
    assert read(cache, start(cache, [7, 8, 9]), 3) == [7, 8, 9]
    cache.close()


def test_config_counts_memory_in_whole_pages() -> None:
    assert (CONFIG.bytes_per_token, CONFIG.num_pages, CONFIG.page_tokens) == (192, 12, 21)
    assert CONFIG.total_tokens == 252
    assert dataclasses.replace(CONFIG, kv_memory_bytes=10**9).total_tokens == 600


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(0, CONFIG.max_model_len), min_size=1, max_size=30))
def test_a_slot_that_grows_and_shrinks_holds_what_its_length_needs(lengths: list[int]) -> None:
    cache = KVCache(CONFIG)
    slot, length = cache.allocate(), 0
    for wanted in lengths:
        if wanted >= length:
            assert cache.extend(slot, wanted - length)
        else:
            cache.shrink(slot, length - wanted)
        length = wanted
        num_pages = math.ceil(length * CONFIG.bytes_per_token / CONFIG.page_size)
        assert cache.length(slot) == cache.used_tokens == length
        assert len(cache.page_offsets(slot)) == num_pages
        assert cache.num_free_pages == CONFIG.num_pages - math.ceil(length / CONFIG.page_tokens)
        # With the page that comes next, from two tokens before it on.
        num_mapped = math.ceil(min(length + 2, CONFIG.max_model_len) * CONFIG.bytes_per_token / CONFIG.page_size)
        assert length == 0 or cache.xtensor.page(slot, num_mapped - 1) is not None
    with pytest.raises(ValueError, match="max_model_len=100"):
        cache.extend(slot, CONFIG.max_model_len + 1 - length)
    cache.close()


@pytest.mark.parametrize(
    ("num_layers", "kv_memory_bytes", "expected"),
    [
        (28, 1 << 30, 2 << 20),
        # 16 tokens of a small model are no reason for pages of 2 MiB.
        (1, 1 << 30, 64 << 10),
        # 8 TiB in 2 MiB are more mappings than any system allows by default.
        (28, 8 << 40, 64 << 20),
    ],
)
def test_page_size_follows_model_and_system(num_layers: int, kv_memory_bytes: int, expected: int) -> None:
    config = KVCacheConfig(
        num_layers=num_layers,
        num_kv_heads=8,
        head_dim=128,
        dtype=torch.bfloat16,
        max_model_len=4096,
        num_slots=64,
        kv_memory_bytes=kv_memory_bytes,
    )
    if kv_memory_bytes < 1 << 40:
        assert config.page_size == expected
    else:
        assert 2 << 20 <= config.page_size <= expected


def test_budget_below_one_sequence_names_numbers_and_next_step() -> None:
    with pytest.raises(ValueError, match=r"holds 84 tokens of 192 bytes.*needs 20480 bytes; raise kv_memory_bytes"):
        dataclasses.replace(CONFIG, kv_memory_bytes=5 * 4096 - 1)
    with pytest.raises(ValueError, match=r"needs 20480 bytes; raise kv_memory_bytes to at least 20480$"):
        dataclasses.replace(CONFIG, kv_memory_bytes=4095)
    with pytest.raises(ValueError, match="num_slots=0 must be at least 1"):
        dataclasses.replace(CONFIG, num_slots=0)
    with pytest.raises(ValueError, match="page_bytes=128 is less than a token's 192 bytes"):
        dataclasses.replace(CONFIG, page_bytes=128)


def test_too_few_mappings_are_an_error_before_any_work() -> None:
    config = dataclasses.replace(CONFIG, kv_memory_bytes=1 << 40)
    with pytest.raises(ValueError, match=r"may need \d+ mappings.*raise vm.max_map_count by at least \d+"):
        KVCache(config)
    config = dataclasses.replace(CONFIG, num_slots=1 << 30)
    with pytest.raises(ValueError, match=r"for 1073741824 slots, .* lower kv_memory_bytes or max_num_seqs"):
        KVCache(config)


def test_addresses_that_cannot_be_reserved_name_the_next_step() -> None:
    config = dataclasses.replace(CONFIG, max_model_len=2**44, kv_memory_bytes=2**52, page_bytes=2**48)
    with pytest.raises(ValueError, match=r"refuses \d+ bytes of addresses.*lower max_num_seqs or max_model_len"):
        KVCache(config)


def test_layers_are_strided_views_of_one_range() -> None:
    cache = KVCache(CONFIG)
    assert [tuple(layer.shape) for layer in cache.layers] == [(6, 100, 2, 1, 8)] * 3
    slot_elements = cache.xtensor.slot_bytes // 4
    assert all(layer.stride() == (slot_elements, 48, 8, 8, 1) for layer in cache.layers)
    assert cache.layers[1].data_ptr() - cache.layers[0].data_ptr() == 64
    half = KVCache(dataclasses.replace(CONFIG, dtype=torch.bfloat16))
    assert half.layers[1].dtype == torch.bfloat16


@pytest.mark.parametrize("num_layers", [9, 28, 32])
def test_the_tokens_of_large_models_spread_over_all_sets_of_the_caches(num_layers: int) -> None:
    config = KVCacheConfig(
        num_layers=num_layers,
        num_kv_heads=8,
        head_dim=128,
        dtype=torch.bfloat16,
        max_model_len=64,
        num_slots=1,
        kv_memory_bytes=64 << 20,
    )
    cache = KVCache(config)
    line = cache.layers[0].stride(1) * 2 // 64
    for num_sets, num_tokens in ((64, 8), (2048, 64)):
        # The first line of as many tokens as a block of attention takes: a set has few of them.
        sets = [token * line % num_sets for token in range(num_tokens)]
        assert len(set(sets)) == num_tokens
    assert config.bytes_per_token <= math.prod(config.token_shape) * 2 * 1.016
    # Padding is no part of any layer.
    for layer in cache.layers:
        assert layer.shape == (1, 64, 2, 8, 128) and layer[0, 0].is_contiguous()
    cache.close()


def test_pages_are_mapped_as_tokens_come() -> None:
    cache = KVCache(CONFIG)
    slot = cache.allocate()
    assert cache.xtensor.num_mapped(slot) == 0
    assert cache.extend(slot, 10)
    assert cache.xtensor.num_mapped(slot) == 1
    assert cache.extend(slot, 11)
    # 21 tokens fit the first page; the next one but one will not.
    assert cache.xtensor.num_mapped(slot) == 2 and cache.stats.num_maps_ahead == 1
    assert cache.extend(slot, 1) and cache.stats.num_maps == 2
    assert cache.num_pages_by_state() == {"free": 10, "allocated": 0, "mapped": 2, "reusable": 0}


def test_extend_stops_at_the_budget_and_at_the_slot() -> None:
    cache = KVCache(CONFIG)
    slots = [cache.allocate() for _ in range(3)]
    assert cache.extend(slots[0], 100) and cache.extend(slots[1], 100)
    assert cache.num_free_pages == 2
    assert not cache.extend(slots[2], 43) and cache.length(slots[2]) == 0
    assert cache.extend(slots[2], 42) and cache.num_free_pages == 0
    assert cache.used_tokens == 242
    with pytest.raises(ValueError, match="would hold 101 tokens, max_model_len=100"):
        cache.extend(slots[0], 1)


def test_no_idle_slot_is_a_named_error() -> None:
    cache = KVCache(CONFIG)
    for _ in range(6):
        cache.allocate()
    with pytest.raises(KVCacheFullError, match="all 6 KV slots"):
        cache.allocate()


def test_without_prefix_cache_a_freed_set_of_matching_size_serves_the_next_sequence() -> None:
    cache = KVCache(dataclasses.replace(CONFIG, prefix_cache=False))
    small, large = start(cache, [1] * 20), start(cache, [1] * 90)
    assert cache.length(large) == 90
    cache.free(small)
    cache.free(large)
    num_maps = cache.stats.num_maps
    assert start(cache, [2] * 88) == large
    assert start(cache, [3] * 19) == small
    assert cache.stats.num_maps == num_maps


def test_a_prefix_is_mapped_and_its_boundary_copied() -> None:
    cache = KVCache(CONFIG)
    tokens = list(range(70))
    first = start(cache, tokens)
    other = [*tokens[:55], *range(500, 520)]
    second = cache.allocate(chain_of(cache, other), len(other), len(other))
    # 13 blocks of 4 are alike. They fill two pages; the third is begun.
    assert cache.length(second) == 52
    assert [cache.xtensor.page(second, position) for position in (0, 1)] == [
        cache.xtensor.page(first, position) for position in (0, 1)
    ]
    assert cache.xtensor.page(second, 2) != cache.xtensor.page(first, 2)
    assert cache.extend(second, len(other) - 52)
    settle(cache)
    write(cache, second, other, 52)
    assert read(cache, second, len(other)) == other
    assert read(cache, first, 70) == tokens
    assert (cache.stats.num_shared_pages, cache.stats.num_hit_tokens) == (2, 52)
    assert cache.stats.num_copied_bytes == 52 * 192 - 2 * 4096


def test_the_last_token_is_always_computed() -> None:
    cache = KVCache(CONFIG)
    tokens = list(range(40))
    cache.free(start(cache, tokens))
    assert cache.find(chain_of(cache, tokens), 40) == 36
    assert cache.find(chain_of(cache, tokens), 41) == 40


def test_a_slot_that_has_the_prefix_mapped_takes_it_without_a_system_call() -> None:
    cache = KVCache(CONFIG)
    # 64 tokens are exactly three pages.
    tokens = list(range(65))
    first = start(cache, tokens)
    cache.free(start(cache, list(range(200, 260))))
    cache.free(first)
    before = cache.stats.num_maps
    assert cache.allocate(chain_of(cache, tokens), 65, 65) == first
    assert cache.length(first) == 64 and cache.stats.num_maps == before


def test_shared_pages_count_once_and_only_the_last_holder_frees_them() -> None:
    cache = KVCache(CONFIG)
    tokens = list(range(65))
    first = start(cache, tokens)
    assert cache.num_free_pages == 8
    chain = chain_of(cache, tokens)
    assert cache.num_unheld_pages(chain, 64) == 1
    second = start(cache, tokens)
    assert cache.num_free_pages == 7
    assert (cache.num_own_pages(first), cache.num_own_pages(second)) == (1, 1)
    cache.free(first)
    assert cache.num_free_pages == 8 and cache.num_own_pages(second) == 4
    cache.free(second)
    assert cache.num_free_pages == 12
    assert cache.num_unheld_pages(chain, 64) == 4


def test_cached_content_gives_way_the_oldest_first_and_from_its_end() -> None:
    cache = KVCache(CONFIG)
    old, new = list(range(60)), list(range(100, 160))
    cache.free(start(cache, old))
    cache.free(start(cache, new))
    assert cache.num_free_pages == 12
    busy = cache.allocate()
    assert cache.extend(busy, 100)
    other = cache.allocate()
    assert cache.extend(other, 42)
    assert cache.stats.num_evicted_pages == 1
    assert cache.find(chain_of(cache, new), 61) == 60
    assert cache.find(chain_of(cache, old), 61) == 40


def test_a_copy_from_the_only_page_that_is_left_is_that_page() -> None:
    cache = KVCache(dataclasses.replace(CONFIG, kv_memory_bytes=5 * 4096))
    tokens = list(range(30))
    cache.free(start(cache, tokens))
    busy = cache.allocate()
    assert cache.extend(busy, 60)
    assert cache.num_free_pages == 2
    other = [*tokens[:24], 7, 8]
    slot = start(cache, other)
    assert cache.stats.num_hit_tokens == 24
    assert read(cache, slot, 26) == other


def test_what_failed_or_gave_its_memory_back_is_not_found() -> None:
    cache = KVCache(CONFIG)
    tokens = list(range(50))
    chain = chain_of(cache, tokens)
    slot = start(cache, tokens)
    cache.forget()
    assert cache.find(chain, 51) == 0
    cache.free(slot)
    slot = start(cache, tokens)
    other = start(cache, list(range(300, 320)))
    cache.free(slot)
    cache.give_back()
    assert cache.find(chain, 51) == 0
    assert cache.num_pages_by_state()["free"] == 11
    assert read(cache, other, 20) == list(range(300, 320))
    assert read(cache, start(cache, tokens), 50) == tokens


def test_sharing_stops_where_mappings_run_out() -> None:
    cache = KVCache(CONFIG)
    # What live sequences map, all other pages once, and an end of the range of each slot.
    cache.xtensor.memory.max_mappings = 3 + 1 + 9 + 6
    tokens = list(range(43))
    slots = [start(cache, tokens) for _ in range(3)]
    assert cache.stats.num_shared_pages == 1 and cache.stats.num_hit_tokens == 40
    assert all(read(cache, slot, 43) == tokens for slot in slots)


@dataclass
class _Sequence:
    tokens: list[int]
    chain: BlockChain
    num_computed: int = 0
    unwritten: list[tuple[int, int]] = field(default_factory=list)


class SlotMachine(RuleBasedStateMachine):
    """Any order of operations keeps the budget, and each live slot holds what its sequence computed."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCache(CONFIG)
        self.live: dict[int, _Sequence] = {}

    @precondition(lambda self: len(self.live) < CONFIG.num_slots)
    @rule(start=st.integers(0, 2), length=st.integers(1, 90), tail=st.integers(0, 3))
    def allocate(self, start: int, length: int, tail: int) -> None:
        # Few different beginnings, so that many are shared.
        tokens = [100 * start + at for at in range(length)] + [900 + tail]
        chain = chain_of(self.cache, tokens)
        cached = self.cache.find(chain, len(tokens))
        unheld = self.cache.num_unheld_pages(chain, cached)
        free = self.cache.num_free_pages
        if unheld > free:
            return
        slot = self.cache.allocate(chain, len(tokens), cached)
        assert slot not in self.live and self.cache.length(slot) == cached < len(tokens)
        assert self.cache.num_free_pages == free - unheld
        self.live[slot] = _Sequence(tokens, chain, cached)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), count=st.integers(1, 60))
    def compute(self, data: st.DataObject, count: int) -> None:
        slot = data.draw(st.sampled_from(sorted(self.live)))
        sequence = self.live[slot]
        end = min(sequence.num_computed + count, CONFIG.max_model_len)
        while len(sequence.tokens) < end:
            sequence.tokens.append(data.draw(st.integers(0, 1)))
        before = sequence.num_computed
        counted = -(-end // CONFIG.page_tokens) - -(-before // CONFIG.page_tokens)
        free = self.cache.num_free_pages
        has_room = self.cache.extend(slot, end - before)
        assert has_room == (counted <= free) and self.cache.num_free_pages == free - has_room * counted
        if has_room:
            sequence.num_computed = end
            self.settle()
            write(self.cache, slot, sequence.tokens[:end], before)
            sequence.chain.update(sequence.tokens)
            self.cache.commit(slot, sequence.chain, end)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), count=st.integers(1, 40))
    def draft_in_vain(self, data: st.DataObject, count: int) -> None:
        slot = data.draw(st.sampled_from(sorted(self.live)))
        computed = self.live[slot].num_computed
        count = min(count, CONFIG.max_model_len - computed)
        before = self.cache.num_free_pages
        if count and self.cache.extend(slot, count):
            for layer in self.cache.layers:
                layer[slot, computed : computed + count] = -1
            self.cache.shrink(slot, count)
        assert self.cache.num_free_pages == before

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.live)))
        own, free = self.cache.num_own_pages(slot), self.cache.num_free_pages
        self.cache.free(slot)
        del self.live[slot]
        assert self.cache.num_free_pages == free + own

    @rule()
    def give_back(self) -> None:
        self.settle()
        self.cache.give_back()

    def settle(self) -> None:
        settle(self.cache)

    @invariant()
    def budget_holds_and_contents_stay(self) -> None:
        states = self.cache.num_pages_by_state()
        assert sum(states.values()) == CONFIG.num_pages and states["allocated"] == 0
        assert 0 <= self.cache.num_free_pages <= CONFIG.num_pages
        assert self.cache.num_free_slots == CONFIG.num_slots - len(self.live)
        assert self.cache.used_tokens == sum(sequence.num_computed for sequence in self.live.values())
        self.settle()
        for slot, sequence in self.live.items():
            assert self.cache.length(slot) == sequence.num_computed
            assert read(self.cache, slot, sequence.num_computed) == sequence.tokens[: sequence.num_computed]


TestSlotMachine = SlotMachine.TestCase
TestSlotMachine.settings = settings(max_examples=60, stateful_step_count=30)


@given(st.integers(1, 5000))
@settings(max_examples=50)
def test_scheduling_never_counts_fewer_pages_than_are_touched(num_tokens: int) -> None:
    assert CONFIG.pages_for(num_tokens) <= -(-num_tokens // CONFIG.page_tokens)
