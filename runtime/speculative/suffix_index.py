"""Where the end of a text occurred before, and what followed.

It answers what a suffix tree answers: the longest suffixes of a text that occurred earlier, in the text itself or in
others, and how often each token came next. Kept are not the nodes of a tree but the occurrences themselves, the last
few of each pair of tokens: a new token moves the ones that match on by one place and drops the others, so a token
costs microseconds, a text costs one entry per token, and a text can be taken out again.
Source: SuffixDecoding, arXiv:2411.04975, of which these are the trees, the counts and the limit by match length.
"""

import itertools
from collections import OrderedDict
from collections.abc import Sequence

# Of a pair of tokens, the occurrences looked at: the newest ones.
MAX_OCCURRENCES = 16
# Matches are not measured further back than this; all longer ones are equally good.
MAX_DEPTH = 64
_SHORTEST = 2

Place = tuple[list[int], int]
"""A text, and the index of the token after the pair."""


class PairIndex:
    """The places of pairs of tokens, the newest last."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, int], list[Place]] = {}

    def add(self, text: list[int], end: int) -> None:
        """Note the pair that ends before index ``end`` of the text."""
        places = self._places.setdefault((text[end - 2], text[end - 1]), [])
        places.append((text, end))
        if len(places) > MAX_OCCURRENCES:
            del places[0]

    def remove(self, text: list[int]) -> None:
        """Forget all pairs of the text."""
        for pair in {*itertools.pairwise(text)}:
            places = [place for place in self._places.get(pair, ()) if place[0] is not text]
            if places:
                self._places[pair] = places
            else:
                self._places.pop(pair, None)

    def places(self, pair: tuple[int, int]) -> Sequence[Place]:
        return self._places.get(pair, ())

    def __len__(self) -> int:
        """Pairs that have a place."""
        return len(self._places)


class Matches:
    """The occurrences of the end of one growing text in an index."""

    def __init__(self, index: PairIndex) -> None:
        self._index = index
        self._found: list[tuple[list[int], int, int]] = []
        """(text, index of what follows, tokens that match before it)."""

    @property
    def length(self) -> int:
        """Tokens of the longest match, 0 when there is none."""
        return max((length for _, _, length in self._found), default=0)

    def advance(self, text: list[int], end: int) -> None:
        """The text now ends before index ``end``: one token more, or the first look at it.

        The pair before ``end`` must not be in the index yet.
        """
        token = text[end - 1]
        self._found = [
            (other, at + 1, length + 1) for other, at, length in self._found if at < len(other) and other[at] == token
        ]
        if not self._found and end >= _SHORTEST:
            places = self._index.places((text[end - 2], token))
            self._found = [(other, at, _match_length(text, end, other, at)) for other, at in places]

    def draft(self, text: list[int], limit: int, min_token_prob: float) -> list[int]:
        """At most ``limit`` tokens that followed the longest matches, each the most frequent one among them.

        Ends before a token that fewer than min_token_prob of the longest matches lead to.
        """
        longest = self.length
        places = [(other, at) for other, at, length in self._found if length == longest]
        total, drafted = len(places), list[int]()
        while len(drafted) < limit:
            following: dict[int, list[Place]] = {}
            # The newest first: of equally frequent ones it wins.
            for other, at in reversed(places):
                token = _token_at(other, at, text, drafted)
                if token is not None:
                    following.setdefault(token, []).append((other, at + 1))
            if not following:
                break
            token, places = max(following.items(), key=lambda item: len(item[1]))
            if len(places) < min_token_prob * total:
                break
            places.reverse()
            drafted.append(token)
        return drafted


class TextStore:
    """Texts in an index, at most ``max_tokens`` in all: those that were of no use the longest go first."""

    def __init__(self, max_tokens: int) -> None:
        self.index = PairIndex()
        self.num_tokens = 0
        self._max_tokens = max_tokens
        self._texts: OrderedDict[int, list[int]] = OrderedDict()

    def add(self, text: list[int]) -> None:
        """Keep the text, its end where it is too long. It must not change any more."""
        text = text[-self._max_tokens :]
        if len(text) < _SHORTEST:
            return
        self._texts[id(text)] = text
        self.num_tokens += len(text)
        for end in range(_SHORTEST, len(text) + 1):
            self.index.add(text, end)
        while self.num_tokens > self._max_tokens:
            _, oldest = self._texts.popitem(last=False)
            self.num_tokens -= len(oldest)
            self.index.remove(oldest)

    def touch(self, matches: Matches) -> None:
        """The texts of these matches were of use."""
        for text, _, _ in matches._found:
            if id(text) in self._texts:
                self._texts.move_to_end(id(text))


def _match_length(text: list[int], end: int, other: list[int], at: int) -> int:
    """Equal tokens before index ``end`` of ``text`` and before index ``at`` of ``other``, of which two are known."""
    length, most = _SHORTEST, min(end, at, MAX_DEPTH)
    while length < most and text[end - 1 - length] == other[at - 1 - length]:
        length += 1
    return length


def _token_at(other: list[int], at: int, text: list[int], drafted: list[int]) -> int | None:
    if at < len(other):
        return other[at]
    # A text that repeats itself goes on with what was just drafted for it.
    if other is text and at - len(other) < len(drafted):
        return drafted[at - len(other)]
    return None
