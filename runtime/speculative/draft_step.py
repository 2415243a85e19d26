"""The arrays of a step whose first sequences verify drafts."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from xllm_compile.runtime.speculative.proposer import Draft, Speculation
from xllm_compile.runtime.step import Int32Array, Step


def with_drafts(step: Step, sequences: Sequence[Speculation], drafts: Sequence[Draft]) -> Step:
    """``step`` with the rows of its first len(sequences) sequences made anew: their last token, then their draft.

    Each has one row there, whose logits are the first wanted ones. Of their new rows the logits of all are wanted, or
    of the last one.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    seq_start, context_len = [0], []
    logits_at: list[int] = []
    for sequence, draft in zip(sequences, drafts, strict=True):
        text, drafted = sequence.token_ids, draft.token_ids
        end = len(text)
        token_ids.append(text[-1])
        positions.append(end - 1)
        if drafted:
            token_ids += drafted
            positions += range(end, end + len(drafted))
            if draft.has_logits:
                logits_at += range(len(token_ids) - len(drafted) - 1, len(token_ids) - 1)
        logits_at.append(len(token_ids) - 1)
        seq_start.append(len(token_ids))
        context_len.append(end + len(drafted))
    num_rows = len(token_ids)
    count = len(sequences)
    num_more = num_rows - count
    # One array for all that is new: the device stands still meanwhile.
    sizes = (num_rows, num_rows, count + 1, count, len(logits_at))
    new = np.array([*token_ids, *positions, *seq_start, *context_len, *logits_at], dtype=np.int32)
    ends = list(accumulate(sizes))
    tokens, at, starts, contexts, wanted = (new[end - size : end] for size, end in zip(sizes, ends, strict=True))
    return Step(
        token_ids=_joined(tokens, step.token_ids[count:]),
        positions=_joined(at, step.positions[count:]),
        # All are behind the prompt, whose length has no part in it then.
        rope_len=_joined(at + np.int32(1), step.rope_len[count:]),
        seq_start=_joined(starts, step.seq_start[count + 1 :], num_more),
        context_len=_joined(contexts, step.context_len[count:]),
        slot=step.slot,
        logits_at=_joined(wanted, step.logits_at[count:], num_more),
        pool_at=step.pool_at + num_more if len(step.pool_at) else step.pool_at,
        page_ops=step.page_ops,
    )


def move_rows(step: Step, positions: Sequence[int]) -> None:
    """Have the first len(positions) sequences of ``step``, of one row each, stand there: it was planned before the
    drafts of the steps before it were verified."""
    count = len(positions)
    step.positions[:count] = positions
    # All are behind the prompt, whose length has no part in it then.
    step.rope_len[:count] = step.context_len[:count] = step.positions[:count] + np.int32(1)


def _joined(new: Int32Array, rest: Int32Array, offset: int = 0) -> Int32Array:
    return np.concatenate((new, rest + offset)) if len(rest) else new
