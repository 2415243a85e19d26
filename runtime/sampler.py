"""Logits to tokens. Each row depends on its own state only, so a seeded request never notices the batch around it.

A row is drawn by inverting its cumulative distribution at one uniform number from its own generator (`draw`). Order of
the steps: penalties, logit_bias, min_tokens, grammar; temperature; min-p, top-k, top-p.

Log-probabilities are those of the model: before penalties, biases and temperature.

R rows of logits, V vocabulary.
"""

import math
import random
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xllm_compile.runtime.draw import Draw, draw_tokens
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.runtime.token_matcher import GrammarError, TokenMatcher

IMPROBABLE = "the model gives no probability to anything that the structured output allows"


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """The asked-for token first, then the most probable ones in order."""

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledToken:
    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingFailure:
    """The row held nothing to choose from; only this request fails."""

    reason: str


class SamplingState:
    """What sampling has to remember of one sequence."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        *,
        stop_ids: Sequence[int] = (),
        index: int = 0,
        matcher: TokenMatcher | None = None,
    ) -> None:
        """stop_ids may not be chosen before min_tokens. index tells the n sequences of a seeded request apart. matcher
        follows a structured output."""
        self.params = params
        self.matcher = matcher
        self.output_counts: dict[int, int] = {}
        self.num_output_tokens = 0
        self._prompt_token_ids = prompt_token_ids
        self._stop_ids = torch.tensor(sorted(set(stop_ids)), dtype=torch.long)
        self._bias_ids = torch.tensor(list(params.logit_bias), dtype=torch.long)
        self._bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
        self._seen = torch.empty(0, dtype=torch.bool)
        self._generator: random.Random | None = None
        self._seed = secrets.randbits(63) if params.seed is None else (params.seed + index) % 2**64
        self._is_plain_greedy = params.is_greedy and params.logprobs is None and not params.logit_bias
        self._is_penalised = params.presence_penalty != 0 or params.frequency_penalty != 0
        self._is_repetition_penalised = params.repetition_penalty != 1
        self._is_plain_greedy &= not (self._is_penalised or self._is_repetition_penalised)

    def record(self, token_id: int) -> None:
        """Count a token that became part of the output."""
        self.num_output_tokens += 1
        if self.matcher is not None:
            self.matcher.accept(token_id)
        if self._is_penalised or self._is_repetition_penalised:
            self.output_counts[token_id] = self.output_counts.get(token_id, 0) + 1
        if self._seen.numel():
            self._seen[token_id] = True

    def replay(self, token_ids: Sequence[int]) -> None:
        """Go on as if this state had sampled these tokens."""
        for token_id in token_ids:
            self.record(token_id)
        if not self.params.is_greedy:
            # Each token takes one number; of a request without a seed nobody knows which.
            for _ in token_ids:
                self.uniform()

    def uniform(self) -> float:
        """The next number in [0, 1) of this sequence's own generator."""
        if self._generator is None:
            self._generator = random.Random(self._seed)
        return self._generator.random()

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the token is the largest logit, of those that a grammar allows, and nothing else is wanted."""
        return self._is_plain_greedy and self.num_output_tokens >= self.params.min_tokens

    @property
    def mask_ahead(self) -> TokenMatcher | None:
        """The matcher, if the mask of the next token should be ready when its logits are."""
        if self.matcher is None or (self.is_plain_greedy and not self.matcher.is_costly):
            return None
        return self.matcher

    @property
    def edits_logits(self) -> bool:
        """Whether the model's logits change; a grammar only forbids some of them."""
        return (
            self._is_penalised
            or self._is_repetition_penalised
            or bool(self.params.logit_bias)
            or self.num_output_tokens < self.params.min_tokens
        )

    def edited(self, row: Tensor) -> Tensor:
        """A copy of the row [V] with penalties, biases, min_tokens and grammar applied. Raises GrammarError."""
        mask = None if self.matcher is None else self.matcher.mask()
        if mask is not None and not self.edits_logits:
            return mask.applied(row)
        row = row.clone()
        params = self.params
        if self._is_repetition_penalised:
            seen = self._seen_tokens(len(row))
            penalised = torch.where(row > 0, row / params.repetition_penalty, row * params.repetition_penalty)
            row = torch.where(seen, penalised, row)
        if self._is_penalised and self.output_counts:
            ids = torch.tensor(list(self.output_counts))
            counts = torch.tensor(list(self.output_counts.values()), dtype=torch.float32)
            row[ids] -= params.presence_penalty + params.frequency_penalty * counts
        if params.logit_bias:
            row[self._bias_ids] += self._bias
        if self.num_output_tokens < params.min_tokens:
            stop_ids = self._stop_ids[self._stop_ids < len(row)]
            # A structured output that is complete ends, however short it is.
            if mask is None or not mask.is_within(stop_ids):
                row[stop_ids] = -math.inf
        return row if mask is None else mask.applied(row)

    def _seen_tokens(self, vocab_size: int) -> Tensor:
        """[V] bool, the tokens of prompt and output; built on first use, then kept up by record()."""
        if not self._seen.numel():
            self._seen = torch.zeros(vocab_size, dtype=torch.bool)
            self._seen[torch.tensor([*self._prompt_token_ids, *self.output_counts], dtype=torch.long)] = True
        return self._seen


def sample(logits: Tensor, states: Sequence[SamplingState]) -> list[SampledToken | SamplingFailure]:
    """Choose one token per row of logits [R, V], float32 on the host, which are not changed."""
    if all(state.is_plain_greedy for state in states):
        return argmax_rows(logits, [state.matcher for state in states])
    with one_thread():
        edited = [edit_row(row, state) for row, state in zip(logits, states, strict=True)]
        draws = {
            at: Draw(row, state.params, state.uniform())
            for at, (row, state) in enumerate(zip(edited, states, strict=True))
            if isinstance(row, Tensor) and not state.params.is_greedy
        }
        drawn = dict(zip(draws, draw_tokens(list(draws.values())), strict=True))
        results: list[SampledToken | SamplingFailure] = []
        for at, (row, state) in enumerate(zip(edited, states, strict=True)):
            if isinstance(row, SamplingFailure):
                results.append(row)
                continue
            token_id = drawn[at] if at in drawn else largest(row)
            if token_id is None:
                results.append(_nothing_to_choose(logits[at], state))
            else:
                results.append(sampled_token(logits[at], token_id, state))
        return results


def sample_row(row: Tensor, state: SamplingState) -> SampledToken | SamplingFailure:
    """Choose one token from the logits [V] of one sequence."""
    (sampled,) = sample(row[None], [state])
    return sampled


def largest(row: Tensor) -> int | None:
    """The most probable token of the row [V]; None where it holds a NaN or has no finite maximum."""
    values = row.numpy()
    # It points at a NaN wherever the row has one.
    token_id = int(values.argmax())
    return token_id if math.isfinite(values[token_id]) else None


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's loops on the calling thread. One row is too short to share: on a busy machine the wait for the
    other threads costs up to a hundred times the work."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def token_logprobs(row: Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    """Log-probabilities of token_id and of the num_top most probable tokens of the row [V]. Rank 1 is the best."""
    normaliser = row.logsumexp(0)
    chosen = row[token_id]
    ids, values, ranks = [token_id], [(chosen - normaliser).item()], [int((row > chosen).sum()) + 1]
    if num_top:
        top = row.topk(min(num_top, len(row)))
        ids += top.indices.tolist()
        values += (top.values - normaliser).tolist()
        ranks += range(1, len(top.indices) + 1)
    return TokenLogprobs(token_ids=ids, logprobs=values, ranks=ranks)


def argmax_rows(logits: Tensor, matchers: Sequence[TokenMatcher | None]) -> list[SampledToken | SamplingFailure]:
    """The most probable token of each row of logits [R, V] that the row's matcher allows."""
    rows = logits.numpy()
    # numpy's argmax is vectorised and torch's is not: 0.15 against 2 ms for 16 rows of 151936.
    chosen = rows.argmax(axis=1).tolist()
    found: list[SampledToken | SamplingFailure] = []
    for at, (token_id, matcher) in enumerate(zip(chosen, matchers, strict=True)):
        # It points at a NaN wherever the row has one, so looking at the chosen value is enough.
        if not math.isfinite(rows[at, token_id]):
            found.append(_failure(logits[at]))
        elif matcher is None:
            found.append(SampledToken(token_id=token_id))
        else:
            found.append(greedy_in_grammar(rows[at], token_id, matcher))
    return found


def greedy_in_grammar(row: npt.NDArray[np.float32], best: int, matcher: TokenMatcher) -> SampledToken | SamplingFailure:
    """The most probable token of the row [V] that the matcher allows; best is the most probable of all."""
    try:
        token_id = matcher.choose(row, best)
    except GrammarError as err:
        return _grammar_failure(err)
    if not math.isfinite(row[token_id]):
        return SamplingFailure(reason=IMPROBABLE)
    return SampledToken(token_id=token_id)


def edit_row(row: Tensor, state: SamplingState) -> Tensor | SamplingFailure:
    """The logits [V] as the request edits them, which may leave nothing; the model's own where it edits none."""
    if not state.edits_logits and state.matcher is None:
        return row
    try:
        return state.edited(row)
    except GrammarError as err:
        return _grammar_failure(err)


def prepare_row(row: Tensor, state: SamplingState) -> Tensor | SamplingFailure:
    """The logits [V] as the request edits them, with something to choose."""
    edited = edit_row(row, state)
    if isinstance(edited, Tensor) and largest(edited) is None:
        return _nothing_to_choose(row, state)
    return edited


def _nothing_to_choose(row: Tensor, state: SamplingState) -> SamplingFailure:
    """Why, from the model's own logits [V]."""
    if largest(row) is None:
        return _failure(row)
    if state.matcher is not None:
        return SamplingFailure(reason=IMPROBABLE)
    return SamplingFailure(reason="min_tokens and logit_bias leave no token to choose; relax them")


def sampled_token(row: Tensor, token_id: int, state: SamplingState) -> SampledToken:
    """The chosen token with the log-probabilities that the request wants, from the model's own logits [V]."""
    num_top = state.params.logprobs
    logprobs = None if num_top is None else token_logprobs(row, token_id, num_top)
    return SampledToken(token_id=token_id, logprobs=logprobs)


def _grammar_failure(err: GrammarError) -> SamplingFailure:
    return SamplingFailure(reason=f"the structured output cannot go on: {err}; simplify it")


def _failure(row: Tensor) -> SamplingFailure:
    what = "NaN" if row.isnan().any() else "no finite maximum"
    return SamplingFailure(reason=f"the model's logits hold {what}; check the weights and the data type")
