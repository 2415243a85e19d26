"""Whether a newcomer fits beside what runs without anyone being preempted later.

A sequence grows by a token per step until it ends, at max_tokens at the latest; then its blocks are free. The newcomer
is admitted when at no time within the horizon more blocks are wanted than there are. Ends at stop tokens are not
foreseen, so this errs on the safe side; the horizon bounds how far, since many a max_tokens is far beyond the need.

Source: xLLM's zero-eviction scheduler, which simulates 256 decode steps.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from xllm_compile.runtime.policies.state import Capacity, Limits, Schedulable

HORIZON = 64
"""Decode steps. On a simulated conversation trace with scarce memory (xllm-bench schedule) 64 avoids all but a few
preemptions and serves the most tokens per second; 256 avoids the rest and loses more than they cost."""


class Growth(NamedTuple):
    """One sequence's demand from now on."""

    num_tokens: int
    """In the KV cache once what is uncomputed now is computed."""
    num_held_blocks: int
    """What it has of that now."""
    num_freed_blocks: int
    """Of those what comes free at its end."""
    steps: int
    """It grows for so many steps, within the horizon,"""
    ends: bool
    """and ends then. Of one that is still in its prompt nobody knows when."""


def growth_of(sequence: Schedulable, capacity: Capacity, horizon: int) -> Growth:
    computed, uncomputed = sequence.num_computed_tokens, sequence.num_uncomputed_tokens
    left = sequence.num_growth_tokens
    return Growth(
        num_tokens=computed + uncomputed,
        num_held_blocks=capacity.blocks(computed) - sequence.num_unheld_blocks,
        num_freed_blocks=sequence.num_kv_blocks,
        steps=min(left, horizon),
        ends=left <= horizon and computed > 0 and uncomputed <= 1,
    )


def fits(growths: Iterable[Growth], num_free_blocks: int, block_tokens: int) -> bool:
    """Whether all of them grow within the free blocks until the horizon.

    Exact for blocks of one token; for larger ones each sequence is counted with its last block full.
    """
    ordered = sorted(growths, key=lambda growth: growth.steps)
    last = block_tokens - 1
    num_growing = len(ordered)
    num_tokens = sum(growth.num_tokens + last for growth in ordered)
    num_grown = 0
    num_given = sum(growth.num_held_blocks for growth in ordered)
    # Between two ends demand only grows: it is greatest right before one.
    for growth in ordered:
        wanted = (num_tokens + num_growing * growth.steps + num_grown) // block_tokens
        if wanted - num_given > num_free_blocks:
            return False
        num_growing -= 1
        num_tokens -= growth.num_tokens + last
        if growth.ends:
            num_given += growth.num_freed_blocks - growth.num_held_blocks
        else:
            num_grown += growth.num_tokens + last + growth.steps
    return True


def lacks_room(
    num_tokens: int, running: Sequence[Schedulable], capacity: Capacity, limits: Limits, *, horizon: int, steps: int
) -> str | None:
    """Why a sequence of so many tokens, which grows for ``steps`` more, has no place now beside what runs and what is
    reserved; None where it has one."""
    num_seqs = len(running) + capacity.num_held_seqs
    if num_seqs >= limits.max_num_seqs:
        return f"{num_seqs} sequences have all places of max_num_seqs={limits.max_num_seqs}"
    newcomer = Growth(
        num_tokens=num_tokens, num_held_blocks=0, num_freed_blocks=0, steps=min(horizon, steps), ends=False
    )
    growths = [newcomer, *(growth_of(sequence, capacity, horizon) for sequence in running)]
    num_free = capacity.num_free_blocks - capacity.num_promised_blocks
    # Alone it may have everything: beyond the horizon nobody else wants it.
    needs = capacity.blocks(num_tokens + 1)
    if needs <= num_free and (num_seqs == 0 or fits(growths, num_free, capacity.block_tokens)):
        return None
    return f"{num_tokens} tokens do not fit into the KV cache beside {num_seqs} sequences"
