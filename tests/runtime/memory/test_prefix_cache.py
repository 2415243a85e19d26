import struct

import xxhash
from hypothesis import given
from hypothesis import strategies as st

from xllm_compile.runtime.memory.prefix_cache import BlockChain, PrefixCache


def chain_of(tokens: list[int], salt: bytes = b"", block_tokens: int = 4) -> list[bytes]:
    chain = BlockChain(block_tokens, salt)
    chain.update(tokens)
    return chain.digests


def test_digests_are_chained_xxh3_128_of_little_endian_int32() -> None:
    first = xxhash.xxh3_128_digest(struct.pack("<4i", 1, 2, 3, 4))
    second = xxhash.xxh3_128_digest(first + struct.pack("<4i", 5, 6, 7, 8))
    assert chain_of([1, 2, 3, 4, 5, 6, 7, 8, 9]) == [first, second]


@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(0, 3), max_size=40), st.integers(1, 5))
def test_digests_are_equal_exactly_where_prefixes_are(left: list[int], right: list[int], size: int) -> None:
    pairs = list(zip(chain_of(left, block_tokens=size), chain_of(right, block_tokens=size), strict=False))
    for index, (a, b) in enumerate(pairs):
        end = (index + 1) * size
        assert (a == b) == (left[:end] == right[:end])


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(0, 60))
def test_a_chain_grows_as_its_tokens_do(tokens: list[int], cut: int) -> None:
    chain = BlockChain(4)
    chain.update(tokens[:cut])
    chain.update(tokens)
    assert chain.digests == chain_of(tokens)


def test_salt_keeps_equal_tokens_apart() -> None:
    assert chain_of([1, 2, 3, 4], b"image") != chain_of([1, 2, 3, 4])


def test_match_ends_at_the_first_block_that_is_missing() -> None:
    cache, digests = PrefixCache(), chain_of(list(range(16)))
    for index in (0, 1, 3):
        cache.add(digests[index], [index], index)
    assert cache.match(digests, 4) == 2
    assert cache.match(digests, 1) == 1
    assert cache.match(chain_of([9] * 16), 4) == 0


def test_evicting_a_page_forgets_every_block_that_touches_it() -> None:
    cache, digests = PrefixCache(), chain_of(list(range(16)))
    for index, pages in enumerate(([0], [0, 1], [1, 2], [2])):
        cache.add(digests[index], pages, index)
    assert sorted(cache.evict(1)) == [1]
    assert [digest in cache for digest in digests] == [True, False, False, True]
    assert sorted(cache.evict(2)) == [2]
    assert cache.evict(2) == [] and len(cache) == 1
    cache.add(digests[1], [0, 3], 1)
    assert sorted(cache.evict(0)) == [0, 3]


def test_the_first_pages_of_a_block_stay() -> None:
    cache, (digest,) = PrefixCache(), chain_of([1, 2, 3, 4])
    cache.add(digest, [5], 0)
    cache.add(digest, [6], 0)
    assert cache.pages(digest) == (5,)
    assert cache.evict(6) == []
