"""The arrays of steps whose sequences stand elsewhere than they were planned to."""

from dataclasses import fields

import numpy as np

from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.runtime.speculative.draft_step import move_rows, with_drafts
from xllm_compile.runtime.speculative.proposer import NO_DRAFT, Speculation
from xllm_compile.runtime.step import Step


def int32(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def text(length: int) -> Speculation:
    return Speculation(
        params=SamplingParams(),
        token_ids=list(range(100, 100 + length)),
        num_prompt_tokens=2,
        max_output_tokens=90,
    )


def test_moved_rows_are_those_that_would_be_made_anew() -> None:
    # Two sequences that decode, and a prompt of three tokens behind them.
    sequences = [text(7), text(12)]
    step = Step(
        token_ids=int32(106, 111, 1, 2, 3),
        positions=int32(5, 9, 0, 1, 2),
        rope_len=int32(6, 10, 3, 3, 3),
        seq_start=int32(0, 1, 2, 5),
        context_len=int32(6, 10, 3),
        slot=int32(4, 5, 6),
        logits_at=int32(0, 1, 4),
    )
    expected = with_drafts(step, sequences, [NO_DRAFT] * 2)
    move_rows(step, [6, 11])
    assert step.positions.tolist() == [6, 11, 0, 1, 2]
    for field in fields(Step):
        assert getattr(step, field.name).tolist() == getattr(expected, field.name).tolist(), field.name
