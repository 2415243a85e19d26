"""From logits to a token: the request's distribution is inverted at one uniform number, in the order of the token ids.

With compiled kernels all rows of a step are one native call, which sorts no vocabulary (ops/cpu/draw.cpp). Where there
are none `draw_plainly` does the same, but for rounding: a process uses one of them.

V vocabulary.
"""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from xllm_compile.runtime.candidates import Kept, request_candidates
from xllm_compile.runtime.ops import native
from xllm_compile.runtime.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Draw:
    """A token to draw from logits [V], float32 and contiguous."""

    row: Tensor
    params: SamplingParams
    uniform: float
    """In [0, 1)."""


def draw_tokens(draws: Sequence[Draw]) -> list[int | None]:
    """A token for each, None where the row holds a NaN or has no finite maximum. Their vocabularies are one."""
    if not native.is_loaded():
        return [draw_plainly(draw) for draw in draws]
    if not draws:
        return []
    rows = np.array([draw.row.data_ptr() for draw in draws], dtype=np.int64)
    options = np.array([_options(draw) for draw in draws], dtype=np.float64)
    tokens = np.empty(len(draws), dtype=np.int64)
    addresses = (ctypes.c_void_p(array.ctypes.data) for array in (rows, options, tokens))
    if native.draw()(ctypes.c_int64(len(draws)), ctypes.c_int64(len(draws[0].row)), *addresses) != 0:
        raise RuntimeError(native.last_error())
    return [None if token < 0 else token for token in tokens.tolist()]


def _options(draw: Draw) -> tuple[float, ...]:
    params = draw.params
    return params.temperature, params.top_k, params.top_p, params.min_p, draw.uniform


def draw_plainly(draw: Draw) -> int | None:
    """One token."""
    if not math.isfinite(draw.row.numpy().max()):
        return None
    return invert(request_candidates(draw.row, draw.params), draw.uniform)


def invert(kept: Kept, uniform: float) -> int:
    """The token in which the sum of the weights passes uniform times their total."""
    weights, token_ids = kept.weights.numpy(), None
    if kept.token_ids is not None:
        order = kept.token_ids.numpy().argsort()
        weights, token_ids = weights[order], kept.token_ids.numpy()[order]
    # In float64 the sum over a large vocabulary keeps its small terms.
    cumulative = weights.cumsum(dtype=np.float64)
    # uniform is at most 1 - 2**-53, so this rounds to less than the total and the search ends inside. "right" passes
    # over tokens of weight zero.
    at = int(cumulative.searchsorted(uniform * cumulative[-1], side="right"))
    return at if token_ids is None else int(token_ids[at])
