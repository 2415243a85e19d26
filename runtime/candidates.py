"""The tokens that top-k, top-p and min-p leave, found without sorting a vocabulary.

Each of the three keeps a prefix of the tokens sorted by probability, so they can be decided on the best N tokens
alone as soon as the prefix provably ends among them. N grows until it does; a flat distribution under a top-p near
1 ends with a full sort. On 151936 tokens topk(256) takes 0.3 ms and a sort 12 ms.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CANDIDATE_COUNTS = (256, 4096)


@dataclass(frozen=True, slots=True)
class Kept:
    """weights [N] float32, proportional to the probabilities; token_ids [N], None when all tokens are kept in order."""

    weights: Tensor
    token_ids: Tensor | None


def keep_candidates(row: Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float) -> Kept:
    """Filter the row [V] of logits, whose largest must be finite.

    min-p goes by the largest probability, top-k by rank, and top-p by the mass of what those two leave. The most
    probable token always stays.
    """
    vocab_size = len(row)
    best = row.amax()
    if 0 < top_k < vocab_size:
        values, token_ids = row.topk(top_k)
        return _cut(_weights(values, best, temperature), token_ids, top_p=top_p, min_p=min_p)
    if top_p >= 1 and min_p <= 0:
        return Kept(_weights(row, best, temperature), None)
    total = None if min_p > 0 else _weights(row, best, temperature).sum(dtype=torch.float64).item()
    for count in CANDIDATE_COUNTS:
        if count >= vocab_size:
            break
        values, token_ids = row.topk(count)
        weights = _weights(values, best, temperature)
        if total is None:
            is_enough = weights[-1].item() < min_p
        else:
            is_enough = weights.sum(dtype=torch.float64).item() >= top_p * total
        if is_enough:
            return _cut(weights, token_ids, top_p=top_p, min_p=min_p, mass=total)
    values, token_ids = row.sort(descending=True)
    return _cut(_weights(values, best, temperature), token_ids, top_p=top_p, min_p=min_p, mass=total)


def _weights(values: Tensor, best: Tensor, temperature: float) -> Tensor:
    """exp((value - best) / temperature): in [0, 1], and 1 for the most probable token."""
    return ((values - best) / temperature).exp()


def _cut(weights: Tensor, token_ids: Tensor, *, top_p: float, min_p: float, mass: float | None = None) -> Kept:
    """Apply min-p, then top-p, to descending weights. `mass` is what top-p refers to; None: what min-p leaves."""
    size = int((weights >= min_p).sum()) if min_p > 0 else len(weights)
    if top_p < 1:
        cumulative = weights[:size].cumsum(0, dtype=torch.float64)
        wanted = torch.as_tensor(top_p * (cumulative[-1].item() if mass is None else mass), dtype=torch.float64)
        size = min(size, int(torch.searchsorted(cumulative, wanted)) + 1)
    return Kept(weights[:size], token_ids[:size])
