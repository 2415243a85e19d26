"""Which physical page lies where in the slots' ranges: what is mapped ahead, left over, taken back and given up.

A freed slot keeps its pages mapped. The next sequence takes the slot that has its prefix, or about as many pages; what
somebody needs is taken from there, content that may be found last.
"""

from collections.abc import Sequence
from itertools import takewhile

from xllm_compile.runtime.kv_cache_config import KVCacheConfig
from xllm_compile.runtime.memory.cached_blocks import CachedBlocks
from xllm_compile.runtime.memory.kv_cache_stats import KVCacheStats
from xllm_compile.runtime.memory.page_ops import PageOps
from xllm_compile.runtime.memory.page_pool import PagePool
from xllm_compile.runtime.memory.virtual_memory import VirtualMemory
from xllm_compile.runtime.memory.xtensor import XTensor

# Free pages whose memory is there before they are taken. The system may need milliseconds to find 2 MiB in one piece.
_NUM_PREPARED = 64


class SlotPages:
    """Knows nothing of sequences but the pages that they hold. Belongs to one thread."""

    def __init__(
        self, config: KVCacheConfig, memory: VirtualMemory, pool: PagePool, blocks: CachedBlocks, stats: KVCacheStats
    ) -> None:
        """Raises ValueError when the system has not as many addresses."""
        self.xtensor = XTensor(memory, config.num_slots, config.max_model_len * config.bytes_per_token)
        self.ops = PageOps()
        """What other ranks have to do alike, and the copies of this one: for the next step."""
        self.idle = set(range(config.num_slots))
        self._num_slots = config.num_slots
        self._pool = pool
        self._blocks = blocks
        self._stats = stats
        self._prepared: set[int] = set()
        """Pages that were asked for ahead, or have been used."""
        if config.pretouch:
            for page in range(config.num_pages):
                memory.prepare(page)
                self._prepared.add(page)

    def page(self, slot: int, position: int) -> int:
        """The page that is there."""
        page = self.xtensor.page(slot, position)
        assert page is not None
        return page

    def open(self, shared: Sequence[int], num_pages: int) -> int:
        """An idle slot for a sequence of about num_pages, with the shared ones, which it holds, at its start.

        Behind them nothing is mapped that the sequence may not write.
        """
        slot = self._choose_slot(shared, num_pages)
        self.idle.remove(slot)
        self._clear_for(slot, shared)
        for position, page in enumerate(shared):
            if self.xtensor.page(slot, position) != page:
                self._map(slot, position, page)
        return slot

    def close(self, slot: int, num_pages: int) -> None:
        """Let go of the slot's first num_pages; all stay mapped until they are needed elsewhere."""
        # The last ones are taken back first: what follows a prefix is of no use without it.
        for position in reversed(range(num_pages)):
            self._pool.let_go(self.page(slot, position))
        self.idle.add(slot)

    def hold(self, slot: int, position: int, *, is_ahead: bool = False) -> None:
        """Make the page at the position, a new one if there is none, the live sequence's."""
        self.xtensor.settle(slot, position)
        page = self.xtensor.page(slot, position)
        if page is None:
            page = self._take()
            self._map(slot, position, page, is_ahead=is_ahead)
        assert self._pool.num_holders(page) == 0 and not self._pool.is_indexed(page)
        self._pool.hold(page)

    def map_ahead(self, slot: int, position: int) -> None:
        """Have a page mapped there by another thread, so that no step waits for it."""
        # Not at the cost of cached content, which a step would take only if it had to, nor of a page mapped ahead.
        num_live = self._num_slots - len(self.idle)
        if self.xtensor.page(slot, position) is None and self._pool.num_spare > num_live:
            page = self._take()
            self._map(slot, position, page, is_ahead=True)
            self._pool.keep(page)

    def prepare(self) -> None:
        """Have the memory of the pages that are taken next brought by another thread. Once for each page."""
        for page in self._pool.next_free(_NUM_PREPARED):
            if page not in self._prepared:
                self._prepared.add(page)
                self.xtensor.prepare(page)

    def num_mappings_with(self, num_shared: int, num_held: int) -> int:
        """Mappings if live sequences held so many pages, one more shared some, and all others were taken by
        somebody."""
        return num_held + num_shared + self._pool.num_available + self._num_slots

    def discard(self) -> None:
        """Give the memory of all pages without a live sequence back to the system."""
        for page in self._pool.idle_pages():
            self._release(page)
            self._pool.free(page)
        for page in self._pool.free_pages():
            self.xtensor.memory.discard(page)
            self._prepared.discard(page)

    def remove(self, count: int) -> list[int]:
        """Pages without a live sequence that are the pool's no longer, and mapped nowhere."""
        if count == 0:
            return []
        # Else their memory might come after it was given to somebody.
        self.xtensor.finish_preparing()
        given = []
        for _ in range(count):
            given.append(self._pool.remove())
            self._release(given[-1])
        self._prepared.difference_update(given)
        return given

    def _choose_slot(self, shared: Sequence[int], num_pages: int) -> int:
        """The idle slot that maps most of the shared pages already; among equals the one of the nearest size."""

        def fitness(slot: int) -> tuple[int, int, int]:
            pages = (self.xtensor.page(slot, position) == page for position, page in enumerate(shared))
            alike = sum(1 for _ in takewhile(bool, pages))
            return -alike, abs(self.xtensor.num_mapped(slot) - num_pages), slot

        return min(self.idle, key=fitness)

    def _clear_for(self, slot: int, shared: Sequence[int]) -> None:
        """Unmap what the slot's new sequence may not write, behind what it shares."""
        begin = end = 0
        for position, page in self.xtensor.mapped(slot):
            is_own = self._pool.num_holders(page) == 0 and not self._pool.is_indexed(page)
            if position < len(shared) or (is_own and len(self.xtensor.places(page)) == 1):
                continue
            if position != end:
                self._unmap(slot, begin, end)
                begin = position
            end = position + 1
        self._unmap(slot, begin, end)

    def _take(self) -> int:
        page = self._pool.take()
        self._prepared.add(page)
        self._release(page)
        return page

    def _release(self, page: int) -> None:
        """Take a page that no live sequence holds out of the index and of all ranges."""
        if self._pool.is_indexed(page):
            self._blocks.evict(page)
            self._stats.num_evicted_pages += 1
        for slot, position in self.xtensor.places(page):
            self._unmap(slot, position, position + 1)

    def _map(self, slot: int, position: int, page: int, *, is_ahead: bool = False) -> None:
        if self.xtensor.num_mappings + 2 * self._num_slots >= self.xtensor.memory.max_mappings:
            self._unmap_idle_slots()
        self.ops.map(slot, position, page)
        self.xtensor.map(slot, position, page, is_ahead=is_ahead)
        self._stats.num_maps += 1
        self._stats.num_maps_ahead += is_ahead

    def _unmap(self, slot: int, begin: int, end: int) -> None:
        if begin < end:
            self.ops.unmap(slot, begin, end)
            self.xtensor.unmap(slot, begin, end)

    def _unmap_idle_slots(self) -> None:
        for slot in self.idle:
            self._unmap(slot, 0, self.xtensor.pages_per_slot)
