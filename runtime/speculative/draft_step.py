"""The arrays of a step whose first sequences verify drafts."""

from collections.abc import Sequence

import numpy as np

from xllm_compile.runtime.speculative.proposer import Draft, Speculation
from xllm_compile.runtime.step import Step


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
        begin = len(sequence.token_ids) - 1
        end = begin + 1 + len(draft.token_ids)
        token_ids.append(sequence.token_ids[-1])
        token_ids += draft.token_ids
        positions += range(begin, end)
        seq_start.append(len(token_ids))
        logits_at += range(len(token_ids) - draft.num_logits, len(token_ids))
        context_len.append(end)
    count = len(sequences)
    num_more = len(token_ids) - count

    def joined(new: Sequence[int], rest: "np.ndarray[tuple[int], np.dtype[np.int32]]") -> "np.typing.NDArray[np.int32]":
        made = np.array(new, dtype=np.int32)
        return np.concatenate((made, rest)) if len(rest) else made

    return Step(
        token_ids=joined(token_ids, step.token_ids[count:]),
        positions=joined(positions, step.positions[count:]),
        # All are behind the prompt, which has no part in it then.
        rope_len=joined([position + 1 for position in positions], step.rope_len[count:]),
        seq_start=joined(seq_start, step.seq_start[count + 1 :] + num_more),
        context_len=joined(context_len, step.context_len[count:]),
        slot=step.slot,
        logits_at=joined(logits_at, step.logits_at[count:] + num_more),
        pool_at=step.pool_at + num_more,
        page_ops=step.page_ops,
    )
