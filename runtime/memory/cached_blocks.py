"""Blocks of KV that can be found by the tokens they were computed from: on pages, and in the tiers below.

A block on pages is found while every page it touches keeps its content. Whoever takes such a page evicts it here first:
its blocks go to the tiers, and come back from there into a sequence's own pages.
"""

from collections.abc import Iterable
from concurrent.futures import Future
from itertools import takewhile

from xllm_compile.runtime.kv_cache_config import KVCacheConfig
from xllm_compile.runtime.kv_events import KVEventLog, KVTier
from xllm_compile.runtime.memory.kv_tiers import KVTiers
from xllm_compile.runtime.memory.page_pool import PagePool
from xllm_compile.runtime.memory.prefix_cache import BlockChain, PrefixCache
from xllm_compile.runtime.memory.virtual_memory import VirtualMemory


class CachedBlocks:
    """Belongs to the engine's thread, but for `digests` and `prefetch`."""

    def __init__(
        self, config: KVCacheConfig, memory: VirtualMemory, pool: PagePool, tiers: KVTiers | None = None
    ) -> None:
        self.tiers = tiers
        self.log = KVEventLog() if tiers is None else tiers.log
        """Told of the blocks that can be found, in pages and in the tiers."""
        self._block_tokens = config.block_tokens
        self._block_bytes = config.block_tokens * config.bytes_per_token
        self._page_size = config.page_size
        self._bytes_per_token = config.bytes_per_token
        self._memory = memory
        self._pool = pool
        self._prefixes = PrefixCache(self.log)

    def __contains__(self, digest: bytes) -> bool:
        """Whether it is found on pages."""
        return digest in self._prefixes

    def digests(self) -> dict[KVTier, list[bytes]]:
        """Of the blocks that can be found. From any thread; with changes after this call see kv_events.py."""
        lower = {} if self.tiers is None else self.tiers.digests()
        return {KVTier.DEVICE: self._prefixes.digests(), **lower}

    def find(self, chain: BlockChain, num_tokens: int) -> int:
        """Tokens at the start of a sequence of num_tokens that are cached; its last token never is."""
        limit = min(len(chain.digests), max(num_tokens - 1, 0) // self._block_tokens)
        found = self._prefixes.match(chain.digests, limit)
        while self.tiers is not None and found < limit and chain.digests[found] in self.tiers:
            found += 1
        return found * self._block_tokens

    def prefetch(self, chain: BlockChain) -> "Future[None] | None":
        """Start to read from disk the blocks of the chain that neither pages nor host memory have.

        None where there is nothing to wait for. From any thread: what changes meanwhile is read or computed again.
        """
        if self.tiers is None:
            return None
        on_pages = self._prefixes.match(chain.digests, len(chain.digests))
        return self.tiers.prefetch(chain.digests[on_pages:])

    def on_pages(self, chain: BlockChain | None, num_cached: int) -> int:
        """Of num_cached tokens, those whose KV lies in pages: the rest is in a tier."""
        if chain is None:
            return 0
        return self._prefixes.match(chain.digests, num_cached // self._block_tokens) * self._block_tokens

    def pages(self, chain: BlockChain | None, num_cached: int) -> tuple[list[int], int | None]:
        """Pages that num_cached tokens fill, by position, and the one that they begin to fill. All are on pages."""
        if chain is None or num_cached == 0:
            return [], None
        pages: dict[int, int] = {}
        for index in range(num_cached // self._block_tokens):
            # Of blocks that touch the same page the last one knows: it was computed behind the others.
            pages.update(zip(self.positions(index), self._prefixes.pages(chain.digests[index]), strict=True))
        num_full = num_cached * self._bytes_per_token // self._page_size
        return [pages[position] for position in range(num_full)], pages.get(num_full)

    def positions(self, index: int) -> range:
        """Positions in its slot of the pages that a sequence's block touches."""
        begin, end = index * self._block_bytes, (index + 1) * self._block_bytes
        return range(begin // self._page_size, -(-end // self._page_size))

    def add(self, digest: bytes, index: int, pages: Iterable[int]) -> None:
        """A sequence's block can be found from here on; it lies on these pages, which are live."""
        pages = list(pages)
        self._prefixes.add(digest, pages, index)
        self._pool.index(pages)

    def read(self, chain: BlockChain | None, begin: int, end: int) -> list[bytes]:
        """The blocks of tokens [begin, end) from the tiers, up to the first that these have lost meanwhile."""
        if chain is None or self.tiers is None:
            return []
        size = self._block_tokens
        found = (self.tiers.read(digest) for digest in chain.digests[begin // size : end // size])
        return list(takewhile(lambda data: data is not None, found))  # type: ignore[arg-type]

    def evict(self, page: int) -> None:
        """Leave the blocks on the page to the tiers: all of what they touch is still as it was."""
        if self.tiers is not None:
            for digest in self._prefixes.blocks_on(page):
                if digest not in self.tiers:
                    self.tiers.offload(digest, self._copy(digest))
        self.forget(page)

    def forget(self, page: int) -> None:
        """Blocks that touch the page are not found any more."""
        for orphan in self._prefixes.evict(page):
            self._pool.unindex(orphan)

    def _copy(self, digest: bytes) -> bytes:
        offset, left, parts = self._prefixes.index(digest) * self._block_bytes % self._page_size, self._block_bytes, []
        for page in self._prefixes.pages(digest):
            count = min(left, self._page_size - offset)
            parts.append(self._memory.read(page, offset, count))
            offset, left = 0, left - count
        return b"".join(parts)
