"""Greedy decode steps in a row, for a draft model: each step goes on with the most probable tokens of the one before.

A draft model's step is so short that what surrounds it in Python takes as long. With compiled graphs the whole row is
one native call; `decode_by_steps` is what it does, and what stands in for it where a graph is missing.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from torch import Tensor

from xllm_compile.runtime.compiled_graph import DecodeLoop
from xllm_compile.runtime.graph_cache import DYNAMIC, GraphCache, GraphChoice
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


class DecodeLoops:
    """Loops over the graphs of one model, one for each pair of sizes that layers and head have had; made anew when the
    graphs change."""

    def __init__(self, layers: Sequence[tuple[str, list[Tensor]]], head: list[Tensor]) -> None:
        """The regions of embed and layers in order, each with the tensors that it always gets; those of the head."""
        self._layers = layers
        self._own = [*(own for _, own in layers), head]
        self._loops: dict[tuple[int, int], tuple[tuple[int, int], DecodeLoop | None]] = {}
        """With the generations of the graphs that it has."""

    def of(self, graphs: GraphCache, layers: GraphChoice, heads: GraphCache, head: GraphChoice) -> DecodeLoop | None:
        """None where a region has no compiled graph for these choices."""
        key = layers.size if layers.is_bucket else DYNAMIC, head.size if head.is_bucket else DYNAMIC
        generations = graphs.generation, heads.generation
        known = self._loops.get(key)
        if known is None or known[0] != generations:
            found = graphs.compiled([region for region, _ in self._layers], layers)
            last = heads.compiled(["head"], head)
            loop = None if found is None or last is None else DecodeLoop([*found, *last], self._own)
            known = self._loops[key] = generations, loop
        return known[1]
