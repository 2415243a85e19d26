"""Greedy decode steps in a row, for a draft model: each step goes on with the most probable tokens of the one before.

A draft model's step is so short that what surrounds it in Python takes as long. With compiled graphs the whole row is
one native call; `decode_by_steps` is what it does, and what stands in for it where a graph is missing.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np
from torch import Tensor

from xllm_compile.runtime.step import Int32Array, ModelRunner, Step


class DraftRunner(ModelRunner, Protocol):
    """A model runner that can draft."""

    def decode_greedily(self, step: Step, num_steps: int) -> Int32Array:
        """Run ``step``, which has one token of each of S sequences, and after it num_steps - 1 more, each on the most
        probable tokens of the one before. Returns these, int32 [num_steps, S]."""
        ...


def decode_by_steps(execute: Callable[[Step], Tensor], step: Step, num_steps: int) -> Int32Array:
    """See DraftRunner.decode_greedily."""
    chosen = np.empty((num_steps, len(step.slot)), dtype=np.int32)
    for at in range(num_steps):
        chosen[at] = execute(step).numpy().argmax(axis=1)
        context_len = step.context_len + 1
        step = replace(
            step,
            token_ids=chosen[at],
            positions=step.positions + 1,
            rope_len=np.maximum(step.rope_len, context_len),
            context_len=context_len,
        )
    return chosen
