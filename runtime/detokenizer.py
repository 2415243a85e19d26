"""Token ids to text as they arrive: whole characters only, special tokens left out, stop strings found and cut.

`Utf8Decoder` is exact and O(1) per token for byte-level vocabularies (GPT-2, Llama 3, Qwen, DeepSeek), where each
token is a byte string. `WindowDecoder` serves the others (SentencePiece with byte fallback) by decoding a window of
the last few tokens with and without the new one.

`StopMatcher` runs the Knuth-Morris-Pratt automaton of every stop string over the text, so its answer does not depend
on how the text is cut into tokens, and it knows how much of the end may still become a stop string.
"""

import codecs
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from xllm_compile.runtime.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
# An incomplete character has at most three bytes; more tokens than that are invalid UTF-8, not unfinished.
MAX_PENDING_TOKENS = 3


class TextDecoder(Protocol):
    def push(self, token_id: int) -> str:
        """Text that the token completes."""

    def flush(self) -> str:
        """Text of what is still incomplete: a replacement character, or nothing."""


class Utf8Decoder:
    def __init__(self, tokenizer: "Tokenizer", *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDecoder:
    def __init__(self, tokenizer: "Tokenizer", *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._window: list[int] = []
        self._num_read = 0
        """Tokens of the window whose text was returned; they stay as the left context of the others."""

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        before, after = self._decode(self._num_read), self._decode(len(self._window))
        if after.endswith(REPLACEMENT) and len(self._window) - self._num_read <= MAX_PENDING_TOKENS:
            return ""
        return self._take(before, after)

    def flush(self) -> str:
        return self._take(self._decode(self._num_read), self._decode(len(self._window)))

    def _take(self, before: str, after: str) -> str:
        del self._window[: self._num_read]
        self._num_read = len(self._window)
        return after[len(before) :]

    def _decode(self, count: int) -> str:
        return self._tokenizer.decode(self._window[:count], skip_special_tokens=False)


class StopMatcher:
    """Feeds text through; keeps back what may be the beginning of a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = list(stop)
        self._borders = [_borders(pattern) for pattern in self._stop]
        self._matched = [0] * len(self._stop)

    @property
    def num_held(self) -> int:
        """Characters at the end of the text so far that begin some stop string."""
        return max(self._matched, default=0)

    def push(self, text: str) -> tuple[int, str] | None:
        """Read on. At the first stop string that is complete: (characters of `text` up to its end, the string)."""
        if not self._stop:
            return None
        for at, char in enumerate(text):
            complete = self._step(char)
            if complete:
                return at + 1, max(complete, key=len)
        return None

    def _step(self, char: str) -> list[str]:
        complete = []
        for which, pattern in enumerate(self._stop):
            borders, length = self._borders[which], self._matched[which]
            while length and pattern[length] != char:
                length = borders[length - 1]
            length += pattern[length] == char
            if length == len(pattern):
                complete.append(pattern)
                length = borders[length - 1]
            self._matched[which] = length
        return complete


class Detokenizer:
    """Text of one sequence. `text` is final: it never shrinks and never changes."""

    def __init__(self, decoder: TextDecoder, *, stop: Sequence[str] = (), include_stop: bool = False) -> None:
        self._decoder = decoder
        self._matcher = StopMatcher(stop)
        self._include_stop = include_stop
        self._text = ""
        self._parts: list[str] = []
        """Follows `_text`; joined only when somebody asks for it."""
        self._new: list[str] = []
        self._held = ""

    @property
    def text(self) -> str:
        if self._parts:
            self._text += "".join(self._parts)
            self._parts.clear()
        return self._text

    def push(self, token_id: int, *, may_stop: bool = True) -> str | None:
        """Add a token. Returns the stop string that it completes; the text then ends there.

        With may_stop=False no stop string is looked for in this token's text or across its end.
        """
        text = self._decoder.push(token_id)
        if may_stop:
            return self._search(text)
        self._emit(text)
        return None

    def finish(self) -> str | None:
        """The sequence ended without a stop string: give out what was kept back. A last character cut in the middle
        becomes U+FFFD and may complete a stop string, which is then returned."""
        stop = self._search(self._decoder.flush())
        if stop is None:
            self._emit(self._held)
            self._held = ""
        return stop

    def skip(self, num_chars: int) -> None:
        """Whoever reads has the first num_chars already: `text` and what is new begin behind them."""
        self._text, self._parts = self.text[num_chars:], []
        self._new = [self._text]

    def take_new(self) -> str:
        """Text that came since the last call."""
        new = "".join(self._new)
        self._new.clear()
        return new

    def _emit(self, text: str) -> None:
        if text:
            self._parts.append(text)
            self._new.append(text)

    def _search(self, text: str) -> str | None:
        found = self._matcher.push(text)
        if found is None:
            text = self._held + text
            keep = len(text) - self._matcher.num_held
            self._emit(text[:keep])
            self._held = text[keep:]
            return None
        end, stop = found
        text = self._held + text[:end]
        self._emit(text if self._include_stop else text[: len(text) - len(stop)])
        self._held = ""
        return stop


def make_detokenizer(
    tokenizer: "Tokenizer", *, skip_special_tokens: bool, stop: Sequence[str], include_stop: bool
) -> Detokenizer:
    kind = Utf8Decoder if tokenizer.is_byte_level else WindowDecoder
    decoder: TextDecoder = kind(tokenizer, skip_special_tokens=skip_special_tokens)
    return Detokenizer(decoder, stop=stop, include_stop=include_stop)


def detokenize(tokenizer: "Tokenizer", token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
    """The text that the tokens give when they arrive one by one."""
    detokenizer = make_detokenizer(tokenizer, skip_special_tokens=skip_special_tokens, stop=(), include_stop=False)
    for token_id in token_ids:
        detokenizer.push(token_id)
    detokenizer.finish()
    return detokenizer.text


def _borders(pattern: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(pattern)
    length = 0
    for at in range(1, len(pattern)):
        while length and pattern[at] != pattern[length]:
            length = borders[length - 1]
        length += pattern[at] == pattern[length]
        borders[at] = length
    return borders
