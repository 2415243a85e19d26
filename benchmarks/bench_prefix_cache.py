"""Hit rate of the prefix cache on a trace that names the blocks of each prompt, such as Mooncake's.

The index and the pool are the runtime's; nothing is computed. Blocks are the trace's own, of 512 tokens.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from xllm_compile.benchmarks.console import finish, show_table
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.runtime.memory.page_pool import PagePool
from xllm_compile.runtime.memory.prefix_cache import BlockChain, PrefixCache


def run_prefix_cache(
    trace: Path, results: Path, command: Sequence[str], *, name: str, capacities: Sequence[int]
) -> None:
    """Replay the trace against each capacity in blocks, and without a limit, and write NAME.json."""
    prompts = [json.loads(line)["hash_ids"] for line in trace.read_text().splitlines()]
    num_blocks = sum(map(len, prompts))
    ideal = ideal_hits(prompts) / num_blocks
    rates, lookup_us = {}, 0.0
    for capacity in (*capacities, num_blocks):
        started_s = time.perf_counter()
        rates[capacity] = replay(prompts, capacity) / num_blocks
        lookup_us = (time.perf_counter() - started_s) / num_blocks * 1e6
    rows = [(f"{capacity} blocks", f"{rate:.4f}") for capacity, rate in rates.items()]
    show_table(f"{trace.name}, {num_blocks} blocks", ("capacity", "hits"), [*rows, ("ideal", f"{ideal:.4f}")])
    bars = [
        Bar(what="hits against the trace's ideal, unlimited", value=rates[num_blocks] / ideal, unit="x", bar=">= 1"),
        Bar(what="hits, unlimited", value=rates[num_blocks], unit="of blocks"),
        Bar(what="hash, look up and insert", value=lookup_us, unit="us per block"),
    ]
    raw = {"num_prompts": len(prompts), "num_blocks": num_blocks, "ideal": ideal, "hit_rates": rates}
    finish(make_record(name, command, seed=0, raw=raw, bars=bars), results)


def ideal_hits(prompts: Sequence[Sequence[int]]) -> int:
    """Blocks that some earlier prompt had behind the same blocks."""
    seen: set[tuple[int, int]] = set()
    hits = 0
    for prompt in prompts:
        # A hash of the trace stands for its whole prefix, so it and its place are enough.
        places = list(enumerate(prompt))
        hits += next((at for at, place in enumerate(places) if place not in seen), len(places))
        seen.update(places)
    return hits


def replay(prompts: Sequence[Sequence[int]], capacity: int) -> int:
    """Hits with room for so many blocks, the least recently used going first."""
    pool, cache = PagePool(capacity), PrefixCache()
    hits = 0
    for prompt in prompts:
        chain = BlockChain(1)
        chain.update(prompt)
        digests = chain.digests[:capacity]
        found = cache.match(digests, len(digests))
        hits += found
        pages = [cache.pages(digest)[0] for digest in digests[:found]]
        for page in pages:
            pool.hold(page)
        for index, digest in enumerate(digests[found:], start=found):
            page = pool.take()
            for orphan in cache.evict(page):
                pool.unindex(orphan)
            pool.hold(page)
            cache.add(digest, [page], index)
            pool.index([page])
            pages.append(page)
        for page in reversed(pages):
            pool.let_go(page)
    return hits
