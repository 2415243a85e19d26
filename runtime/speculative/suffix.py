"""Drafts from text that is there already: the request's own, and what other requests got.

Nothing is drawn: the same texts give the same draft.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from xllm_compile.runtime.speculative.proposer import NO_DRAFT, Draft, Speculation
from xllm_compile.runtime.speculative.suffix_index import Matches, PairIndex, TextStore

# A draft is at most this many times as long as its match. The trees of SuffixDecoding use the same factor.
MAX_FACTOR = 1.0
MIN_TOKEN_PROB = 0.1
# Of a longer prompt the end is read: a microsecond takes about two tokens.
MAX_PROMPT_TOKENS = 16384
# Kinds of drafts from finished outputs follow those from the request's own text.
_KINDS = 8


@dataclass(eq=False, slots=True)
class _Reader:
    """How far a sequence's tokens are read, and what they match."""

    pairs: PairIndex
    own: Matches
    others: Matches | None
    num_read: int = 0


class SuffixProposer:
    """Continues the longest match of a sequence's last tokens in its own text and in finished outputs.

    max_shared_tokens bounds the outputs that are kept; 0 keeps none, which is prompt-lookup n-grams.
    """

    is_costly = False

    def __init__(self, *, max_shared_tokens: int) -> None:
        self._store = TextStore(max_shared_tokens) if max_shared_tokens else None
        self._readers: dict[Speculation, _Reader] = {}

    def observe(self, sequence: Speculation) -> int | None:
        """Classes of match lengths: 2-3, 4-7, 8-15, ... tokens."""
        reader = self._readers.get(sequence)
        if reader is None:
            pairs = PairIndex()
            others = Matches(self._store.index) if self._store else None
            reader = self._readers[sequence] = _Reader(pairs, Matches(pairs), others)
        self._read(reader, sequence.token_ids)
        own = reader.own.length
        shared = reader.others.length if reader.others else 0
        length = max(own, shared)
        if length == 0:
            return None
        return min(length.bit_length(), _KINDS - 1) + (_KINDS if shared > own else 0)

    def propose(self, sequences: Sequence[Speculation], lengths: Sequence[int]) -> list[Draft]:
        """See Proposer.propose."""
        return [
            self._draft(sequence, length) if length else NO_DRAFT
            for sequence, length in zip(sequences, lengths, strict=True)
        ]

    def forget(self, sequence: Speculation) -> None:
        """The sequence ended: what it generated serves others from now on."""
        self._readers.pop(sequence, None)
        if self._store is not None:
            self._store.add(sequence.token_ids[sequence.num_prompt_tokens :])

    def _read(self, reader: _Reader, text: list[int]) -> None:
        if reader.num_read == 0:
            # Of a prompt only the end has to be matched, and the step waits for it.
            for end in range(max(2, len(text) - MAX_PROMPT_TOKENS), len(text)):
                reader.pairs.add(text, end)
            reader.num_read = len(text) - 1
        for end in range(reader.num_read + 1, len(text) + 1):
            reader.own.advance(text, end)
            if reader.others is not None:
                reader.others.advance(text, end)
            if end >= 2:
                reader.pairs.add(text, end)
        reader.num_read = len(text)

    def _draft(self, sequence: Speculation, length: int) -> Draft:
        reader = self._readers[sequence]
        matches = reader.own
        if reader.others is not None and reader.others.length > matches.length:
            matches = reader.others
            if self._store is not None:
                self._store.touch(matches)
        limit = min(length, int(MAX_FACTOR * matches.length))
        return Draft(matches.draft(sequence.token_ids, limit, MIN_TOKEN_PROB))
