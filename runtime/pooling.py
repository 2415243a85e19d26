"""Embeddings: which hidden states of a prompt make one, and how.

Hidden states are those after the model's final norm: transformers' ``last_hidden_state``. They come from the same steps
as generated tokens, in the region ``pool``, which stands beside the head. Of a prompt in chunks the mean is summed
chunk by chunk in float32.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

POOLINGS = ("last", "mean")


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolingParams:
    """What one request for an embedding wants. Raises ValueError, naming field, value and limit, on a bad value."""

    pooling: str = "last"
    """last: the last token's state; mean: of all tokens."""
    normalize: bool = True
    """Scale to length 1."""
    dimensions: int | None = None
    """Keep that many of the first elements, before normalising; None keeps all."""

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling={self.pooling!r} must be one of {', '.join(POOLINGS)}")
        if self.dimensions is not None and self.dimensions < 1:
            raise ValueError(f"dimensions={self.dimensions} must be at least 1")


def pool_chunk(hidden: "Tensor", params: PoolingParams) -> "Tensor":
    """[E] of the rows [n, E] that a chunk brought: the last one, or their sum. A copy."""
    return hidden[-1].clone() if params.pooling == "last" else hidden.sum(0)


def make_embedding(pooled: "Tensor", num_tokens: int, params: PoolingParams) -> npt.NDArray[np.float32]:
    """[dimensions] of what the chunks of a prompt of ``num_tokens`` add up to, [E] float32."""
    if params.pooling == "mean":
        pooled = pooled / num_tokens
    values: npt.NDArray[np.float32] = pooled[: params.dimensions].numpy()
    if not params.normalize:
        return values
    length = float(np.linalg.norm(values))
    return values / np.float32(length) if length > 0 else values
