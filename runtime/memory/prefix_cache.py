"""Finds KV by the tokens it was computed from: blocks of tokens under chained hashes, and the pages that hold them.

A block's digest is the XXH3-128 of its parent's digest and its token ids, so it names the whole prefix up to its end.
A block need not fill a page: ``pages`` of a block are all the pages its bytes touch, one to a few, and a page is
found under every block that touches it.
"""

import array
from collections.abc import Iterable, Sequence

import xxhash

from xllm_compile.runtime.kv_events import KVEventLog, KVTier

DIGEST_BYTES = 16


def split_digests(digests: bytes) -> list[bytes]:
    """Of digests one after the other. Raises ValueError where they end early."""
    if len(digests) % DIGEST_BYTES:
        raise ValueError(f"{len(digests)} bytes of digests are no multiple of {DIGEST_BYTES}")
    return [digests[begin : begin + DIGEST_BYTES] for begin in range(0, len(digests), DIGEST_BYTES)]


class BlockChain:
    """Digests of the whole blocks of one growing list of tokens."""

    def __init__(self, block_tokens: int, salt: bytes = b"") -> None:
        """``salt`` keeps apart what tokens do not tell: images, adapters."""
        self.digests: list[bytes] = []
        self._block_tokens = block_tokens
        self._salt = salt

    def copy(self) -> "BlockChain":
        """Goes on from here by itself."""
        chain = BlockChain(self._block_tokens, self._salt)
        chain.digests = list(self.digests)
        return chain

    def update(self, token_ids: Sequence[int]) -> None:
        """Add the blocks that token_ids, the same list as before or longer, fill by now."""
        size = self._block_tokens
        parent = self.digests[-1] if self.digests else self._salt
        for begin in range(len(self.digests) * size, len(token_ids) - size + 1, size):
            block = array.array("i", token_ids[begin : begin + size])
            parent = xxhash.xxh3_128_digest(parent + block.tobytes())
            self.digests.append(parent)


class PrefixCache:
    """Digest -> pages. Knows nothing of who holds a page: ``runtime/kv_cache.py`` evicts by page."""

    def __init__(self, log: KVEventLog | None = None) -> None:
        """log is told of the blocks that come and go."""
        self._log = log or KVEventLog()
        self._pages: dict[bytes, tuple[int, ...]] = {}
        self._indices: dict[bytes, int] = {}
        self._digests: dict[int, list[bytes]] = {}

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._pages

    def digests(self) -> list[bytes]:
        """Of all blocks, the newest last. From any thread: one call of the interpreter."""
        return list(self._pages)

    def match(self, digests: Sequence[bytes], limit: int) -> int:
        """How many blocks from the start are found, at most limit."""
        found = 0
        while found < limit and digests[found] in self._pages:
            found += 1
        return found

    def pages(self, digest: bytes) -> tuple[int, ...]:
        return self._pages[digest]

    def index(self, digest: bytes) -> int:
        """Which block of its sequence it is: where in its first page it begins follows from that."""
        return self._indices[digest]

    def blocks_on(self, page: int) -> list[bytes]:
        """Digests of the blocks that touch the page."""
        return list(self._digests.get(page, ()))

    def add(self, digest: bytes, pages: Iterable[int], index: int) -> None:
        """Raises no error for a digest that is there: the pages it was first computed in stay."""
        if digest in self._pages:
            return
        self._indices[digest] = index
        self._pages[digest] = tuple(pages)
        for page in self._pages[digest]:
            self._digests.setdefault(page, []).append(digest)
        self._log.record(KVTier.DEVICE, True, digest)

    def evict(self, page: int) -> list[int]:
        """Forget every block that touches the page. Returns the pages, this one among them, without blocks now."""
        orphans = [page] if page in self._digests else []
        for digest in self._digests.pop(page, ()):
            del self._indices[digest]
            for other in self._pages.pop(digest):
                if other == page:
                    continue
                left = self._digests[other]
                left.remove(digest)
                if not left:
                    del self._digests[other]
                    orphans.append(other)
            self._log.record(KVTier.DEVICE, False, digest)
        return orphans
