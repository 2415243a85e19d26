"""How sequences come to share KV: what a waiting one would find cached, and which should wait a step for more."""

from collections.abc import Iterable, Iterator

from xllm_compile.runtime.kv_cache import KVCache
from xllm_compile.runtime.memory.prefix_cache import BlockChain
from xllm_compile.runtime.sequence import Sequence

# A step is waited for where it saves at least so many tokens: fewer are computed sooner.
_MIN_TOKENS_WORTH_A_STEP = 64


def readable_chain(sequence: Sequence) -> BlockChain | None:
    """What the sequence may take from the cache; None where its prompt has to be computed for what it brings."""
    is_wanted = sequence.wants_prompt_logprobs or sequence.request.params.pooling is not None
    return None if is_wanted else sequence.chain


def look_up(kv_cache: KVCache, waiting: Iterable[Sequence], max_num_seqs: int) -> None:
    """Note how much is cached or swapped out of waiting sequences, and the pages they would take for that.

    Of the first max_num_seqs: more cannot start. The others count as not cached.
    """
    for index, sequence in enumerate(waiting):
        chain = readable_chain(sequence) if index < max_num_seqs else None
        swapped = sequence.swapped if index < max_num_seqs else None
        if chain is None and swapped is None:
            sequence.num_computed_tokens = sequence.num_unheld_blocks = 0
            continue
        if chain is not None:
            chain.update(sequence.token_ids)
        found = kv_cache.find(chain, sequence.num_tokens) if swapped is None else swapped.num_tokens
        sequence.num_computed_tokens = found
        sequence.num_unheld_blocks = kv_cache.num_unheld_pages(chain, found)


def without_followers(chunks: Iterable[tuple[Sequence, int]], kv_cache: KVCache) -> Iterator[tuple[Sequence, int]]:
    """The planned chunks, less those of waiting sequences whose next blocks another chunk of the step computes.

    They start in the step after, and find them.
    """
    under_way: set[bytes] = set()
    for sequence, count in chunks:
        chain, size = sequence.chain, kv_cache.config.block_tokens
        if chain is not None and kv_cache.config.prefix_cache:
            first = sequence.num_computed_tokens // size
            if sequence.slot is None and readable_chain(sequence) is not None:
                saved = sum(digest in under_way for digest in chain.digests[first : (sequence.num_tokens - 1) // size])
                if saved * size >= _MIN_TOKENS_WORTH_A_STEP:
                    continue
            if count > 1:
                under_way.update(chain.digests[first : (sequence.num_computed_tokens + count) // size])
        yield sequence, count
