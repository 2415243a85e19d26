"""Follows one sequence through its grammar: which tokens may come next, and which came.

The mask of the next token is known as soon as the last one is, a whole forward pass before it is needed: `prepare`
computes it beside the forward pass, in another thread and with the interpreter released. `mask` waits for it. A greedy
row tries the model's own choice first (`choose`): most often it is allowed, and to try one token costs a fifth of a
mask.

Where the text that must come next is known, the mask allows one token of it, as the tokenizer would cut that text, and
`forced` says how it goes on. To try a token tells no such thing: other ways to spell the text are no error.
"""

import threading
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from llguidance import LLMatcher

# Masks that sequences keep meeting: inside a string, between two keys. 45 MB with 152 thousand tokens.
MAX_KEPT_MASKS = 256

# Below this share of the vocabulary allowed tokens, or forbidden ones, are named one by one: most masks have few of
# either, and a row of 152 thousand is then masked in 20 or 40 us instead of 150.
FEW_TOKENS_SHARE = 1 / 16

# A mask that takes less of a CPU is not worth a thread beside a forward pass that keeps all of them busy.
COSTLY_MASK_S = 1e-4

# Masks between two whose time is taken, which costs as much as a small mask.
_TIME_EVERY = 8


class TokenMask:
    """The tokens [V] that may come next; at least one. Immutable: sequences share it."""

    def __init__(self, allowed: npt.NDArray[np.bool_]) -> None:
        self.allowed = allowed
        count, few = np.count_nonzero(allowed), len(allowed) * FEW_TOKENS_SHARE
        self._few = np.flatnonzero(allowed) if count < few else None
        self._barred = np.flatnonzero(~allowed) if len(allowed) - count < few else None

    @classmethod
    def of(cls, token_ids: Iterable[int], vocab_size: int) -> Self:
        allowed = np.zeros(vocab_size, dtype=np.bool_)
        allowed[list(token_ids)] = True
        return cls(allowed)

    def argmax(self, row: npt.NDArray[np.float32]) -> int:
        """The best allowed token of a row [V]."""
        if self._few is not None:
            return int(self._few[row[self._few].argmax()])
        return int(np.where(self.allowed, row, -np.inf).argmax())

    def is_within(self, token_ids: Tensor) -> bool:
        """Whether nothing but these, each named once, is allowed."""
        return bool(np.count_nonzero(self.allowed) == np.count_nonzero(self.allowed[token_ids.numpy()]))

    def applied(self, row: Tensor) -> Tensor:
        """A copy of the row [V] with the others at minus infinity."""
        values = row.numpy()
        if self._few is not None:
            masked = np.full_like(values, -np.inf)
            masked[self._few] = values[self._few]
        elif self._barred is not None:
            masked = values.copy()
            masked[self._barred] = -np.inf
        else:
            # Half the time of masked_fill_, which branches.
            return torch.where(torch.from_numpy(self.allowed), row, -torch.inf)
        return torch.from_numpy(masked)


class GrammarError(RuntimeError):
    """The grammar cannot go on: it became too complex for its limits, or was given a token it does not allow."""


class TokenMatcher:
    """The state of one sequence. Thread-safe."""

    def __init__(
        self, matcher: "LLMatcher", vocab_size: int, eos_token_ids: Iterable[int], kept_masks: dict[bytes, TokenMask]
    ) -> None:
        """kept_masks has masks by their bits; those who share it share them."""
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(eos_token_ids)
        self._kept_masks = kept_masks
        self._bits = np.zeros((vocab_size + 31) // 32, dtype=np.int32)
        self._bits_address = self._bits.ctypes.data
        self._lock = threading.Lock()
        self._mask: TokenMask | None = None
        """For the present state; None until it is computed."""
        self._forced: list[int] | None = None
        """Likewise what is forced."""
        self._accepted: list[int] = []
        """Tokens that the grammar has not seen: it does with the next question, in whatever thread that is answered."""
        self._tried: int | None = None
        """A token that the grammar has seen ahead, because `allows` was asked about it."""
        self._mask_s: float | None = None
        """CPU time of a mask, smoothed."""
        self._num_untimed = 0
        self._is_ended = False
        """The end-of-sequence token came. What a step that was already under way samples behind it is thrown away."""
        self._error: str | None = None

    def copy(self) -> "TokenMatcher":
        """An independent matcher in the same state, for another sequence."""
        with self._lock:
            if self._mask is None and self._error is None:
                self._compute()
            other = TokenMatcher(self._matcher.deep_copy(), self._vocab_size, self._eos_token_ids, self._kept_masks)
            other._mask, other._is_ended, other._error = self._mask, self._is_ended, self._error
        return other

    @property
    def is_costly(self) -> bool:
        """Whether a mask takes long enough to be computed ahead, even where it may not be needed."""
        return self._mask_s is None or self._mask_s > COSTLY_MASK_S

    def prepare(self) -> None:
        """Compute the mask of the present state, unless it is known. Errors wait for `mask`."""
        with self._lock:
            if self._mask is None and self._error is None:
                self._compute()

    def mask(self) -> TokenMask:
        """Raises GrammarError."""
        with self._lock:
            if self._mask is None and self._error is None:
                self._compute()
            if self._mask is None:
                raise GrammarError(self._error)
            return self._mask

    def choose(self, row: npt.NDArray[np.float32], best: int) -> int:
        """The best allowed token of a row [V] of which ``best`` is the best of all: the mask is computed where that is
        refused only. Raises GrammarError."""
        with self._lock:
            if self._mask is None and self._error is None:
                forced = self._find_forced()
                if forced:
                    return forced[0]
                is_end = self._is_ended or best in self._eos_token_ids
                if not is_end and self._error is None and self._try(best):
                    return best
                self._compute()
            mask = self._mask
            if mask is None:
                raise GrammarError(self._error)
        return best if mask.allowed[best] else mask.argmax(row)

    def num_allowed(self, token_ids: Sequence[int]) -> int:
        """How many of these may come next, one after the other. An end of the sequence is not looked beyond."""
        ends = (at for at, token_id in enumerate(token_ids) if token_id in self._eos_token_ids)
        with self._lock:
            if not self._may_go_on():
                return 0
            return self._matcher.validate_tokens(list(token_ids[: next(ends, len(token_ids))]))

    def forced(self) -> list[int]:
        """Tokens of the text that has to come next, the only ones that masks allow there; empty where there is a
        choice."""
        with self._lock:
            return self._find_forced()

    def _find_forced(self) -> list[int]:
        if self._forced is None:
            self._forced = self._matcher.compute_ff_tokens() if self._may_go_on() else []
        return self._forced

    def _may_go_on(self) -> bool:
        if self._accepted:
            self._consume_accepted()
        if self._tried is not None:
            self._take_back()
        return not self._is_ended and self._error is None

    def accept(self, token_id: int) -> None:
        """The sequence goes on with this token. One that the mask forbids makes every later mask an error."""
        with self._lock:
            self._accepted.append(token_id)
            self._mask = None
            # The rest of a text is cut as it was with its beginning.
            is_forced = self._forced is not None and self._forced[:1] == [token_id]
            self._forced = (self._forced or [])[1:] or None if is_forced else None

    def _try(self, token_id: int) -> bool:
        if self._tried != token_id:
            self._take_back()
            if self._matcher.try_consume_tokens([token_id]) == 1:
                self._tried = token_id
        return self._tried == token_id

    def _take_back(self) -> None:
        if self._tried is not None:
            self._matcher.rollback(1)
            self._tried = None

    def _consume_accepted(self) -> None:
        for token_id in self._accepted:
            if token_id == self._tried:
                self._tried = None
            else:
                self._take_back()
                self._consume(token_id)
        self._accepted.clear()

    def _consume(self, token_id: int) -> None:
        if self._is_ended or self._error is not None:
            return
        if token_id in self._eos_token_ids and self._matcher.is_accepting():
            self._is_ended = True
        elif not self._matcher.consume_token(token_id):
            self._error = f"token {token_id} is not allowed here"

    def _compute(self) -> None:
        self._consume_accepted()
        self._take_back()
        if self._error is not None:
            return
        if self._is_ended:
            self._mask = TokenMask.of(self._eos_token_ids, self._vocab_size)
            return
        if self._mask_s is None or self._num_untimed >= _TIME_EVERY:
            began = time.thread_time()
            self._matcher.unsafe_compute_mask_ptr(self._bits_address, self._bits.nbytes)
            seconds = time.thread_time() - began
            # The first masks of a grammar take a hundred times as long as later ones.
            known = seconds if self._mask_s is None else min(self._mask_s, 2 * seconds)
            self._mask_s = known + 0.3 * (seconds - known)
            self._num_untimed = 0
        else:
            self._matcher.unsafe_compute_mask_ptr(self._bits_address, self._bits.nbytes)
            self._num_untimed += 1
        if self._matcher.is_error():
            self._error = self._matcher.get_error().replace("<non-verbose/>", "").strip()
            return
        key = self._bits.tobytes()
        self._mask = self._kept_masks.get(key)
        if self._mask is None:
            if len(self._kept_masks) >= MAX_KEPT_MASKS:
                self._kept_masks.clear()
            allowed = np.unpackbits(self._bits.view(np.uint8), count=self._vocab_size, bitorder="little")
            self._mask = self._kept_masks[key] = TokenMask(allowed.view(np.bool_))
