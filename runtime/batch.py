"""Turns the scheduler's decision into the arrays of a Step, and remembers which row of logits answers what."""

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import numpy as np

from xllm_compile.runtime.memory.page_ops import Restore
from xllm_compile.runtime.pooling import PoolingParams
from xllm_compile.runtime.sequence import Sequence
from xllm_compile.runtime.speculative.proposer import Speculation
from xllm_compile.runtime.step import Int32Array, Step


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRows:
    """Rows begin, begin + 1, ... of the logits predict token_ids of the sequence's prompt."""

    sequence: Sequence
    begin: int
    token_ids: list[int]
    num_top: int
    """Most probable tokens wanted beside each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolRows:
    """Rows begin, ..., begin + count - 1 of the hidden states are what this chunk adds to an embedding."""

    sequence: Sequence
    params: PoolingParams
    begin: int
    count: int
    is_last: bool
    """The prompt ends with this chunk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    step: Step
    sampled: list[Sequence]
    """Sequences that get a token from this step; their rows of logits are the first ones, in this order."""
    sampled_slots: Int32Array
    """[len(sampled)] their slots, which they may have lost when the result arrives."""
    prompt_rows: list[PromptRows]
    """Rows for prompt_logprobs; they follow."""
    pool_rows: list[PoolRows]
    pending_rows: Int32Array
    """[P] rows of the step whose token is the one that the step before samples. Their token_ids hold a 0."""
    pending_slots: Int32Array
    """[P] slots of their sequences."""
    drafting: list[Speculation]
    """Of the step's first sequences, which may verify drafts and whose positions may be off by what the step before
    accepts: the device makes their rows anew. They are the first sampled ones, with one row each."""
    num_granted: list[int]
    """Most drafted tokens of each,"""
    num_wanted: list[int]
    """and how many guesses it was granted for when the step was planned."""
    restores: Items[Restore]
    """To be in the KV cache before the step."""

    @property
    def is_decode_only(self) -> bool:
        """Whether every sequence computes its last token."""
        return len(self.sampled) == len(self.step.token_ids)


def build_batch(
    chunks: Items[tuple[Sequence, int]],
    page_ops: Int32Array,
    granted: Mapping[Sequence, int] | None = None,
    restores: Items[Restore] = (),
) -> Batch:
    """Arrays for the next `count` tokens of each sequence. Each sequence must own a slot. Changes nothing.

    granted: drafted tokens that the decoding sequences may verify besides. restores: KV that comes back from a tier.
    """
    granted = granted or {}
    # Those whose rows the device may make anew come first.
    chunks = sorted(chunks, key=lambda chunk: chunk[0] not in granted) if granted else chunks
    token_ids: list[int] = []
    positions: list[int] = []
    rope_len: list[int] = []
    seq_start, context_len, slots = [0], [], []
    sampled: list[Sequence] = []
    sampled_at: list[int] = []
    sampled_slots: list[int] = []
    prompt_rows: list[PromptRows] = []
    prompt_at: list[int] = []
    pool_rows: list[PoolRows] = []
    pool_at: list[int] = []
    pending_rows: list[int] = []
    pending_slots: list[int] = []
    for sequence, count in chunks:
        assert sequence.slot is not None
        begin = sequence.num_computed_tokens
        end = begin + count
        first_row = len(token_ids) - begin
        token_ids += sequence.token_ids[begin:end]
        if end > len(sequence.token_ids):
            pending_rows.append(len(token_ids))
            pending_slots.append(sequence.slot)
            token_ids.append(0)
        positions += range(begin, end)
        # By token, not by chunk: a token computed again after a preemption is rotated as it was the first time.
        rope_len += [max(sequence.num_prompt_tokens, position + 1) for position in range(begin, end)]
        seq_start.append(len(token_ids))
        context_len.append(end)
        slots.append(sequence.slot)
        pooling = sequence.request.params.pooling
        if pooling is not None:
            wanted = _pooled_positions(sequence, pooling, begin, end)
            if wanted:
                is_last = end == sequence.num_tokens
                pool_rows.append(
                    PoolRows(sequence=sequence, params=pooling, begin=len(pool_at), count=len(wanted), is_last=is_last)
                )
                pool_at += [first_row + position for position in wanted]
        elif end == sequence.num_tokens:
            sampled.append(sequence)
            sampled_at.append(first_row + end - 1)
            sampled_slots.append(sequence.slot)
        wanted = _predicting_positions(sequence, end)
        if wanted:
            prompt_rows.append(
                PromptRows(
                    sequence=sequence,
                    begin=len(prompt_at),
                    token_ids=sequence.token_ids[wanted.start + 1 : wanted.stop + 1],
                    num_top=sequence.request.params.prompt_logprobs or 0,
                )
            )
            prompt_at += [first_row + position for position in wanted]
    step = Step(
        token_ids=np.array(token_ids, dtype=np.int32),
        positions=np.array(positions, dtype=np.int32),
        rope_len=np.array(rope_len, dtype=np.int32),
        seq_start=np.array(seq_start, dtype=np.int32),
        context_len=np.array(context_len, dtype=np.int32),
        slot=np.array(slots, dtype=np.int32),
        logits_at=np.array(sampled_at + prompt_at, dtype=np.int32),
        pool_at=np.array(pool_at, dtype=np.int32),
        page_ops=page_ops,
    )
    drafting = {one.speculation: granted[one] for one, _ in chunks if one in granted and one.speculation}
    shifted = [replace(rows, begin=rows.begin + len(sampled)) for rows in prompt_rows]
    return Batch(
        step=step,
        sampled=sampled,
        sampled_slots=np.array(sampled_slots, dtype=np.int32),
        prompt_rows=shifted,
        pool_rows=pool_rows,
        restores=restores,
        pending_rows=np.array(pending_rows, dtype=np.int32),
        pending_slots=np.array(pending_slots, dtype=np.int32),
        drafting=list(drafting),
        num_granted=list(drafting.values()),
        num_wanted=[speculation.num_wanted for speculation in drafting],
    )


def _pooled_positions(sequence: Sequence, params: PoolingParams, begin: int, end: int) -> range:
    """Of a chunk, those whose hidden states are part of the embedding."""
    if params.pooling == "mean":
        return range(begin, end)
    return range(end - 1, end) if end == sequence.num_tokens else range(0)


def _predicting_positions(sequence: Sequence, end: int) -> range:
    """Those whose logits, in a chunk up to end, are wanted for what they say of the prompt's next token."""
    if not sequence.wants_prompt_logprobs:
        return range(0)
    return range(sequence.request.num_prompt_logprobs_asked - 1, min(end, sequence.num_prompt_tokens - 1))
