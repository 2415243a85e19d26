"""Lossless acceptance of drafts: what comes out is distributed as if every token had been sampled alone.

Row j of a sequence's logits follows j accepted drafts, so penalties, min_tokens and grammars see exactly the text
that they would see without drafts, and one row after the other is taken until a draft is refused:

- A draft that was not drawn, or a request with a seed: sample the row as ever, and go on while the sample is the draft.
  The chance is the same as of rejection sampling with a distribution of one token. The tokens are the very ones that
  sampling alone gives, because the request's random numbers are used in the same order: a seeded request does not
  notice drafts, and a greedy one even less.
- What a grammar forces needs no logits: sampling could choose nothing else. It takes its random numbers all the same.
- A draft x drawn from q, where the request's distribution is p: accept it with chance min(1, p(x) / q(x)), otherwise
  draw from what q gave too little to, max(0, p - q). Source: Leviathan et al., arXiv:2211.17192, theorem 3.5.

V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from xllm_compile.runtime.candidates import Kept, request_candidates
from xllm_compile.runtime.draw import invert
from xllm_compile.runtime.sampler import (
    SampledToken,
    SamplingFailure,
    SamplingState,
    argmax_rows,
    greedy_in_grammar,
    one_thread,
    prepare_row,
    sample,
    sample_row,
    sampled_token,
)
from xllm_compile.runtime.speculative.proposer import NO_DRAFT, Draft

Verified = list[SampledToken | SamplingFailure]
"""The tokens that a step brought a sequence: at least one, and a failure only as the last."""


def take_forced(states: Sequence[SamplingState], drafts: Sequence[Draft]) -> None:
    """Record what is forced, as `verify` expects it: their masks, those behind it, can be computed meanwhile."""
    for state, draft in zip(states, drafts, strict=True):
        if not draft.has_logits:
            state.replay(draft.token_ids)


def verify(logits: Tensor, states: Sequence[SamplingState], drafts: Sequence[Draft]) -> list[Verified]:
    """Tokens of each sequence. ``logits`` [R, V] float32 has draft.num_logits rows for each of them, in order.

    Records the tokens in the states, which is what makes them count for the next row.
    """
    if not any(draft.token_ids for draft in drafts):
        return _sample(logits, states)
    judged = [draft if draft.has_logits else NO_DRAFT for draft in drafts]
    verified = _verify(logits, states, judged) if any(draft.token_ids for draft in judged) else _sample(logits, states)
    return [
        results if draft.has_logits else [*(SampledToken(token_id=token_id) for token_id in draft.token_ids), *results]
        for draft, results in zip(drafts, verified, strict=True)
    ]


def _sample(logits: Tensor, states: Sequence[SamplingState]) -> list[Verified]:
    sampled = sample(logits[: len(states)], states)
    for result, state in zip(sampled, states, strict=True):
        _record(result, state)
    return [[result] for result in sampled]


def _verify(logits: Tensor, states: Sequence[SamplingState], drafts: Sequence[Draft]) -> list[Verified]:
    spans, begin = [], 0
    for draft in drafts:
        spans.append((begin, begin + draft.num_logits))
        begin = spans[-1][1]
    if all(state.is_plain_greedy for state in states):
        found = argmax_rows(logits[:begin], [None] * begin)
        walks = zip(spans, states, drafts, strict=True)
        return [_walk_greedy(logits[first:end], found[first:end], state, draft) for (first, end), state, draft in walks]
    with one_thread():
        return [
            _verify_one(logits[first:end], state, draft)
            for (first, end), state, draft in zip(spans, states, drafts, strict=True)
        ]


def _walk_greedy(
    rows: Tensor, found: Sequence[SampledToken | SamplingFailure], state: SamplingState, draft: Draft
) -> Verified:
    verified: Verified = []
    for at, sampled in enumerate(found):
        if state.matcher is not None and isinstance(sampled, SampledToken):
            sampled = greedy_in_grammar(rows[at].numpy(), sampled.token_id, state.matcher)
        verified.append(sampled)
        _record(sampled, state)
        if isinstance(sampled, SamplingFailure) or draft.token_ids[at : at + 1] != [sampled.token_id]:
            break
    return verified


def _verify_one(rows: Tensor, state: SamplingState, draft: Draft) -> Verified:
    is_drawn = draft.drawn_from is not None and state.params.seed is None and not state.params.is_greedy
    verified: Verified = []
    for position, drafted in enumerate(draft.token_ids):
        if is_drawn:
            assert draft.drawn_from is not None
            sampled = _accept_or_redraw(rows[position], state, drafted, draft.drawn_from[position])
        else:
            sampled = sample_row(rows[position], state)
        verified.append(sampled)
        _record(sampled, state)
        if isinstance(sampled, SamplingFailure) or sampled.token_id != drafted:
            return verified
    verified.append(sample_row(rows[len(draft.token_ids)], state))
    _record(verified[-1], state)
    return verified


def _accept_or_redraw(row: Tensor, state: SamplingState, drafted: int, source: Kept) -> SampledToken | SamplingFailure:
    """The drafted token, or one in its place, which is never the same."""
    edited = prepare_row(row, state)
    if isinstance(edited, SamplingFailure):
        return edited
    kept = request_candidates(edited, state.params)
    wanted, offered = _probabilities(kept, len(row)), _probabilities(source, len(row))
    if state.uniform() * offered[drafted].item() < wanted[drafted].item():
        return sampled_token(row, drafted, state)
    missing = (wanted - offered).clamp_(min=0)
    # It was refused, so offered is above wanted here, and by as much below elsewhere; unless that is all rounding.
    missing[drafted] = 0
    if not missing.any():
        return sampled_token(row, drafted, state)
    return sampled_token(row, invert(Kept(missing, None), state.uniform()), state)


def _probabilities(kept: Kept, vocab_size: int) -> Tensor:
    """[V] float64."""
    weights = kept.weights.double()
    weights = weights / weights.sum()
    if kept.token_ids is None:
        return weights
    return torch.zeros(vocab_size, dtype=torch.float64).index_put_((kept.token_ids,), weights)


def _record(sampled: SampledToken | SamplingFailure, state: SamplingState) -> None:
    # A sequence that failed has no token; the host drops what follows it.
    state.record(sampled.token_id if isinstance(sampled, SampledToken) else 0)
