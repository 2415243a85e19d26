"""Key/value memory of one instance: slots for sequences over a pool of physical pages, and the cache of prefixes.

``allocate`` gives a sequence a slot. What is cached of its tokens is there already: whole pages are mapped where they
are (one page in many slots), the rest of the last block, which the sequence goes on writing behind, is copied.
``extend`` maps pages as tokens come and the next one ahead of time; ``commit`` makes full blocks findable; ``free``
leaves the pages Reusable, mapped where they are, until somebody needs them.

A page with content that may be found, or that two sequences hold, is never written: sequences only write behind what
they share.
"""

import math
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock

from torch import Tensor

from xllm_compile.runtime.kv_cache_config import KVCacheConfig
from xllm_compile.runtime.kv_events import KVEventLog, KVTier
from xllm_compile.runtime.memory.cached_blocks import CachedBlocks
from xllm_compile.runtime.memory.cpu_memory import CpuMemory
from xllm_compile.runtime.memory.kv_cache_stats import KVCacheStats
from xllm_compile.runtime.memory.kv_tiers import KVTiers
from xllm_compile.runtime.memory.page_ops import PageOps
from xllm_compile.runtime.memory.page_pool import PagePool
from xllm_compile.runtime.memory.prefix_cache import BlockChain
from xllm_compile.runtime.memory.shared_pages import PageShare
from xllm_compile.runtime.memory.slot_pages import SlotPages
from xllm_compile.runtime.memory.swap_space import SwappedKV, SwapSpace
from xllm_compile.runtime.memory.virtual_memory import VirtualMemory
from xllm_compile.runtime.memory.xtensor import XTensor
from xllm_compile.runtime.policies.page_shares import PageUse


class KVCacheFullError(RuntimeError):
    """No slot is free. The scheduler never lets this happen."""


@dataclass(kw_only=True, slots=True)
class _Live:
    """A sequence's slot."""

    length: int
    num_committed: int
    """Blocks whose content can be found, or was found."""
    num_pages: int = 0
    """Positions that hold its tokens: the pages behind them are left over or mapped ahead."""
    same_pages: range = range(0)
    """Lengths between which no page comes or goes, is counted or has to be mapped ahead."""


class KVCache:
    """The slots of one instance. Not thread-safe: it belongs to the engine's thread."""

    def __init__(
        self,
        config: KVCacheConfig,
        memory: VirtualMemory | None = None,
        tiers: KVTiers | None = None,
        share: PageShare | None = None,
        swap_bytes: int | None = None,
    ) -> None:
        """``memory`` is the device's, config.num_pages of config.page_size; None is this machine's.

        ``tiers`` take the blocks that lose their pages, and give them back. With a ``share`` the memory is what several
        models have together: the cache has no page until `wake_up`. swap_bytes of host memory are for `swap_out`.

        Raises ValueError when the system does not allow as many addresses or mappings.
        """
        self.config = config
        self._share = share
        self._resizing = Lock()
        """Held while pages come and go: a model is put to sleep and woken up by other threads than its engine's."""
        if share is not None:
            memory = share.memory
        memory = memory or CpuMemory(config.num_pages, config.page_size)
        needed = config.num_pages + 2 * config.num_slots
        if needed > memory.max_mappings:
            raise ValueError(
                f"kv_memory_bytes={config.kv_memory_bytes} are {config.num_pages} pages for {config.num_slots} slots,"
                f" which may need {needed} mappings where the system allows {memory.max_mappings}; raise"
                f" vm.max_map_count by at least {needed - memory.max_mappings} (sysctl -w vm.max_map_count=...), or"
                " lower kv_memory_bytes or max_num_seqs"
            )
        self.stats = KVCacheStats()
        self._pool = PagePool(config.num_pages, is_empty=share is not None)
        self._blocks = CachedBlocks(config, memory, self._pool, tiers)
        self._pages = SlotPages(config, memory, self._pool, self._blocks, self.stats)
        self.swap = None if swap_bytes is None else SwapSpace(swap_bytes, memory)
        used = config.max_model_len * config.bytes_per_token
        tokens = self.xtensor.ranges[:, :used].view(config.dtype).unflatten(1, (config.max_model_len, -1))
        by_layer = tokens[:, :, : math.prod(config.token_shape)].unflatten(2, config.token_shape)
        self.layers: list[Tensor] = list(by_layer.unbind(2))
        """One tensor [num_slots, max_model_len, 2, num_kv_heads, head_dim] per layer, at a fixed address."""
        self._live: dict[int, _Live] = {}
        self._used_tokens = 0
        self._num_counted = 0
        """Pages of live sequences as scheduling counts them, shared ones for each."""

    @property
    def xtensor(self) -> XTensor:
        return self._pages.xtensor

    @property
    def ops(self) -> PageOps:
        """What other ranks have to do alike, and the copies of this one: for the next step."""
        return self._pages.ops

    @property
    def tiers(self) -> KVTiers | None:
        """Where blocks go that lose their pages."""
        return self._blocks.tiers

    @property
    def log(self) -> KVEventLog:
        """Told of the blocks that can be found, in pages and in the tiers."""
        return self._blocks.log

    @property
    def num_slots(self) -> int:
        return self.config.num_slots

    @property
    def num_free_slots(self) -> int:
        return len(self._pages.idle)

    @property
    def total_tokens(self) -> int:
        """Tokens that one sequence without end could hold; with a share, in the pages that the cache has now."""
        return min(self.config.total_tokens, self._pool.num_pages * self.config.page_tokens)

    @property
    def used_tokens(self) -> int:
        """Tokens of live sequences, what they share counted for each."""
        return self._used_tokens

    @property
    def num_pages(self) -> int:
        return self._pool.num_pages

    @property
    def page_tokens(self) -> int:
        """Tokens for which scheduling counts a page."""
        return self.config.page_tokens

    @property
    def num_free_pages(self) -> int:
        """Pages that live sequences may still get, each counted as `page_tokens` does.

        Cached content is no obstacle: it gives way.
        """
        return self._pool.num_available - self._num_counted + sum(live.num_pages for live in self._live.values())

    def num_pages_by_state(self) -> dict[str, int]:
        return self._pool.num_by_state()

    def length(self, slot: int) -> int:
        return self._live[slot].length

    def page_offsets(self, slot: int) -> list[int]:
        """Where the pages of the slot's sequence are in the device's memory, in bytes, by position."""
        size = self.config.page_size
        return [self._pages.page(slot, position) * size for position in range(self._live[slot].num_pages)]

    def num_own_pages(self, slot: int) -> int:
        """By how much num_free_pages grows when the slot's sequence ends: it does not for what others share."""
        live = self._live[slot]
        pages = (self._pages.page(slot, position) for position in range(live.num_pages))
        return self._counted(live.length) - sum(self._pool.num_holders(page) > 1 for page in pages)

    def digests(self) -> dict[KVTier, list[bytes]]:
        """Of the blocks that can be found. From any thread; with changes after this call see kv_events.py."""
        return self._blocks.digests()

    def new_chain(self, salt: bytes = b"") -> BlockChain:
        """For the tokens of one sequence."""
        return BlockChain(self.config.block_tokens, salt)

    def find(self, chain: BlockChain | None, num_tokens: int) -> int:
        """Tokens at the start of a sequence of num_tokens that are cached; its last token never is."""
        if chain is None or not self.config.prefix_cache:
            return 0
        return self._blocks.find(chain, num_tokens)

    def prefetch(self, chain: BlockChain) -> "Future[None] | None":
        """Start to read from disk the blocks of the chain that neither pages nor host memory have.

        None where there is nothing to wait for. From any thread: what changes meanwhile is read or computed again.
        """
        return self._blocks.prefetch(chain)

    def num_unheld_pages(self, chain: BlockChain | None, num_cached: int) -> int:
        """By how much num_free_pages falls when a sequence starts that finds num_cached tokens or has them swapped out.

        Pages that live sequences hold already cost nothing.
        """
        if num_cached == 0:
            return 0
        shared, _ = self._blocks.pages(chain, self._blocks.on_pages(chain, num_cached))
        return self._counted(num_cached) - sum(self._pool.num_holders(page) > 0 for page in shared)

    def allocate(
        self,
        chain: BlockChain | None = None,
        num_tokens: int = 0,
        num_cached: int = 0,
        swapped: SwappedKV | None = None,
        *,
        is_query: bool = True,
    ) -> int:
        """A slot for a sequence of num_tokens; its `length` is what is cached of them, num_cached at most.

        ``swapped`` comes back behind what is found in pages; num_cached is its number of tokens then. is_query: it
        counts as one more sequence that was looked up.

        Takes `num_unheld_pages` of the free ones. Raises KVCacheFullError when no slot is idle.
        """
        if not self._pages.idle:
            raise KVCacheFullError(f"all {self.num_slots} KV slots are in use; free one first or raise num_slots")
        cached = self._blocks.on_pages(chain, min(self.find(chain, num_tokens), num_cached))
        restored = self._blocks.read(chain, cached, num_cached) if swapped is None else []
        shared, boundary = self._blocks.pages(chain, cached)
        num_held = sum(live.num_pages for live in self._live.values())
        if self._pages.num_mappings_with(len(shared), num_held) > self.xtensor.memory.max_mappings:
            # Sharing pages takes mappings but no pages: without, the pages are the tighter limit.
            cached, shared, boundary, restored = 0, [], None, []
        for page in shared:
            self._pool.hold(page)
        slot = self._pages.open(shared, self.config.pages_for(num_tokens))
        live = self._live[slot] = _Live(length=cached, num_committed=cached // self.config.block_tokens)
        live.num_pages = len(shared)
        if boundary is not None:
            self._copy_boundary(slot, live, boundary)
        if restored:
            cached += self._restore(slot, live, restored)
        self.stats.num_hit_tokens += cached if is_query else 0
        if swapped is not None:
            self._swap_in(slot, live, swapped)
            cached = live.length
        self._used_tokens += cached
        self._num_counted += self._counted(cached)
        if chain is not None and self.config.prefix_cache and is_query:
            self.stats.num_queried_tokens += num_tokens
        self.stats.num_shared_pages += len(shared)
        return slot

    def extend(self, slot: int, num_tokens: int, *, is_ahead: bool = False) -> bool:
        """Let the slot's sequence store num_tokens more. False, and no change, when there are not enough pages.

        is_ahead: another thread maps the pages, and no step may have them before `settle`.
        """
        live = self._live[slot]
        length = live.length + num_tokens
        if length in live.same_pages:
            # Most tokens of most steps: all that is counted below costs a step more than its smallest kernels.
            live.length = length
            self._used_tokens += num_tokens
            return True
        if length > self.config.max_model_len:
            raise ValueError(
                f"slot {slot} would hold {length} tokens, max_model_len={self.config.max_model_len}; "
                "finish the sequence before it outgrows its slot"
            )
        num_more = self._counted(length) - self._counted(live.length)
        if num_more > self.num_free_pages:
            return False
        needed, num_before = self.config.pages_for(length), live.num_pages
        for position in range(num_before, needed):
            self._pages.hold(slot, position, is_ahead=is_ahead)
        live.num_pages = max(needed, num_before)
        self._num_counted += num_more
        live.length = length
        self._used_tokens += num_tokens
        # The page for the next token but one is mapped now, so that no step waits for it.
        if self.config.pages_for(min(length + 2, self.config.max_model_len)) > live.num_pages:
            self._pages.map_ahead(slot, live.num_pages)
        if needed > num_before:
            self._pages.prepare()
        live.same_pages = self._same_pages(live)
        return True

    def settle(self, slot: int) -> None:
        """Wait until all pages of the slot's sequence are mapped."""
        for position in range(self._live[slot].num_pages):
            self.xtensor.settle(slot, position)

    def shrink(self, slot: int, num_tokens: int) -> None:
        """Take back the last num_tokens that the slot was extended by. Pages without tokens stay mapped for now."""
        live = self._live[slot]
        length = live.length - num_tokens
        if length in live.same_pages:
            live.length = length
            self._used_tokens -= num_tokens
            return
        needed = self.config.pages_for(length)
        for position in range(needed, live.num_pages):
            self._pool.let_go(self._pages.page(slot, position))
        live.num_pages = min(needed, live.num_pages)
        self._num_counted += self._counted(length) - self._counted(live.length)
        self._used_tokens -= num_tokens
        live.length = length
        live.same_pages = self._same_pages(live)

    def commit(self, slot: int, chain: BlockChain | None, num_computed: int) -> None:
        """Let others find the blocks that lie in the slot's first num_computed tokens.

        For steps that are launched after the one that computes them: steps run in order.
        """
        if chain is None or not self.config.prefix_cache:
            return
        live = self._live[slot]
        for index in range(live.num_committed, min(num_computed // self.config.block_tokens, len(chain.digests))):
            live.num_committed = index + 1
            if chain.digests[index] not in self._blocks:
                pages = (self._pages.page(slot, position) for position in self._blocks.positions(index))
                self._blocks.add(chain.digests[index], index, pages)

    def swap_out(self, slot: int, num_tokens: int) -> SwappedKV | None:
        """Copy the KV of the slot's first num_tokens to host memory, for `allocate`; None when there is no room.

        The steps that compute them have run.
        """
        num_bytes = num_tokens * self.config.bytes_per_token
        if self.swap is None or not self.swap.has_room(num_bytes):
            return None
        began, page_size = time.perf_counter(), self.config.page_size
        pages = (self._pages.page(slot, position) for position in range(self.config.pages_for(num_tokens)))
        parts = [
            self.xtensor.memory.read(page, 0, min(num_bytes - position * page_size, page_size))
            for position, page in enumerate(pages)
        ]
        swapped = SwappedKV(num_tokens=num_tokens, data=b"".join(parts))
        self.swap.keep(swapped, time.perf_counter() - began)
        return swapped

    def drop_swapped(self, swapped: SwappedKV) -> None:
        """Its sequence ended while it waited."""
        assert self.swap is not None
        self.swap.release(swapped)

    def free(self, slot: int) -> None:
        """End the slot's sequence. Its pages stay mapped until they are needed elsewhere."""
        live = self._live.pop(slot)
        self._pages.close(slot, live.num_pages)
        self._used_tokens -= live.length
        self._num_counted -= self._counted(live.length)

    def forget(self) -> None:
        """Nothing that was computed is found any more: a step failed, or the content is gone."""
        for page in range(self.config.num_pages):
            if self._pool.is_indexed(page):
                self._blocks.forget(page)

    def give_back(self) -> None:
        """Give the memory of all pages without a live sequence back to the system. No step may be under way."""
        self._pages.discard()

    @property
    def share(self) -> PageShare | None:
        """Where several models share the memory, this one's part of it."""
        return self._share

    def balance(self, num_wanted: int) -> None:
        """Give up pages that another model lacks and this one can do without, and take free ones.

        num_wanted: pages that sequences would use soon on top of those they have. No step may be under way while
        ``share.num_asked`` is positive.
        """
        share = self._share
        assert share is not None
        with self._resizing:
            if share.num_asked:
                count = min(share.surplus(self._page_use(num_wanted)), self._pool.num_available)
                given = self._pages.remove(count)
                share.give(given, self._page_use(num_wanted))
            self._pool.add(share.request(self._page_use(num_wanted)))

    def sleep(self) -> None:
        """Give the memory of all pages back, to the system or to the models it is shared with.

        No sequence may be live in the second case, no step under way in either.
        """
        if self._share is None:
            self.give_back()
            return
        assert not self._live, "a model sleeps when its requests are finished"
        with self._resizing:
            self._share.sleep(self._pages.remove(self._pool.num_pages))

    def wake_up(self) -> None:
        """Have room for one sequence of full length again, at least. May wait for other models' steps.

        Raises SharedMemoryFullError, and changes nothing.
        """
        if self._share is not None:
            with self._resizing:
                self._pool.add(self._share.wake())

    def close(self) -> None:
        """End the threads that map and prepare ahead, and the tiers."""
        self.xtensor.close()
        if self.tiers is not None:
            self.tiers.close()

    def _page_use(self, num_wanted: int) -> PageUse:
        return PageUse(
            num_owned=self._pool.num_pages,
            num_held=self._pool.num_pages - self.num_free_pages,
            num_cached=self._pool.num_cached,
            num_wanted=num_wanted,
        )

    def _counted(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.page_tokens)

    def _same_pages(self, live: _Live) -> range:
        """As `_Live.same_pages` has it, of the slot as it is; empty where pages are left over."""
        config, counted = self.config, self._counted(live.length)
        if config.pages_for(live.length) != live.num_pages:
            return range(0)
        size, token_bytes = config.page_size, config.bytes_per_token
        first = max((live.num_pages - 1) * size // token_bytes, (counted - 1) * config.page_tokens) + 1
        # Two tokens before its end the next page is mapped.
        last = min(live.num_pages * size // token_bytes - 2, counted * config.page_tokens, config.max_model_len)
        return range(first, last + 1)

    def _copy_boundary(self, slot: int, live: _Live, source: int) -> None:
        num_bytes = live.length * self.config.bytes_per_token - live.num_pages * self.config.page_size
        self._pool.touch(source)
        self._pages.hold(slot, live.num_pages)
        # Where no other page was left it is the same one: what was to be copied is there.
        if self._pages.page(slot, live.num_pages) != source:
            self.ops.copy(source, slot, live.num_pages, num_bytes)
            self.stats.num_copied_bytes += num_bytes
        live.num_pages += 1

    def _restore(self, slot: int, live: _Live, blocks: Sequence[bytes]) -> int:
        """Put the blocks behind what the slot holds; returns their number of tokens."""
        assert self.tiers is not None
        self.tiers.stats.num_restored += len(blocks)
        num_tokens = len(blocks) * self.config.block_tokens
        needed = self.config.pages_for(live.length + num_tokens)
        for position in range(live.num_pages, needed):
            self._pages.hold(slot, position)
        live.num_pages = max(needed, live.num_pages)
        for data in blocks:
            self.ops.restore(slot, live.length * self.config.bytes_per_token, data)
            live.length += self.config.block_tokens
        return num_tokens

    def _swap_in(self, slot: int, live: _Live, swapped: SwappedKV) -> None:
        needed = self.config.pages_for(swapped.num_tokens)
        for position in range(live.num_pages, needed):
            self._pages.hold(slot, position)
        live.num_pages = max(needed, live.num_pages)
        begin = live.length * self.config.bytes_per_token
        self.ops.restore(slot, begin, swapped.data[begin:])
        live.length = swapped.num_tokens
        self.drop_swapped(swapped)
