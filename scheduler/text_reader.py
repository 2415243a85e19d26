"""Parsers of text that arrives in pieces, written as if all of it were there.

A parser is a generator that asks its reader for text and yields where there is not enough of it. What it decides
depends on the text alone, never on where it was cut: a reader gives out only what no later text can change.
"""

import json
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")

Reading = Generator[None, None, T]
"""Yields None for more text, returns a T."""

_BLANKS = " \t\r\n"
_DIGITS_END = ",}] \t\r\n"


class ParseError(Exception):
    """The text is not what the format says."""


class TextReader:
    """Text that came and was not yet read. From `mark` to `unmark` it keeps what was read."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._is_ended = False
        self._marked: list[str] | None = None

    def feed(self, text: str) -> None:
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self) -> None:
        self._is_ended = True

    def mark(self) -> None:
        self._marked = []

    def unmark(self) -> str:
        """What was read since `mark`."""
        marked, self._marked = self._marked or [], None
        return "".join(marked)

    @property
    def _left(self) -> int:
        return len(self._text) - self._at

    def _take(self, count: int) -> str:
        taken = self._text[self._at : self._at + count]
        self._at += count
        if self._marked is not None:
            self._marked.append(taken)
        return taken

    def rest(self) -> str:
        """All that came and was not read."""
        return self._take(self._left)

    def until(self, marker: str, emit: Callable[[str], None]) -> Reading[bool]:
        """Read and emit what comes before the marker, and skip that. False when the text ended first."""
        while True:
            found = self._text.find(marker, self._at)
            if found >= 0:
                emit(self._take(found - self._at))
                self._take(len(marker))
                return True
            held = 0 if self._is_ended else _overlap(self._text[self._at :], marker)
            if self._left > held:
                emit(self._take(self._left - held))
            if self._is_ended:
                return False
            yield

    def upto(self, marker: str) -> Reading[str]:
        """Everything before the marker, which is skipped. Raises ParseError when the text ends first."""
        parts: list[str] = []
        if not (yield from self.until(marker, parts.append)):
            raise ParseError
        return "".join(parts)

    def try_skip(self, expected: str) -> Reading[bool]:
        """Skip this text if it comes next."""
        while not self._is_ended and self._left < len(expected) and expected.startswith(self._text[self._at :]):
            yield
        if not self._text.startswith(expected, self._at):
            return False
        self._take(len(expected))
        return True

    def skip(self, expected: str) -> Reading[None]:
        if not (yield from self.try_skip(expected)):
            raise ParseError

    def blanks(self) -> Reading[str]:
        """Skip blanks. The character after them, not yet read; empty at the end."""
        while True:
            while self._left and self._text[self._at] in _BLANKS:
                self._take(1)
            if self._left:
                return self._text[self._at]
            if self._is_ended:
                return ""
            yield

    def json_string(self) -> Reading[str]:
        """A string in quotes, decoded. Raises ParseError when there is none."""
        parts: list[str] = []
        yield from self.json_value(parts.append)
        try:
            value = json.loads("".join(parts))
        except ValueError:
            raise ParseError from None
        if not isinstance(value, str):
            raise ParseError
        return value

    def json_value(self, emit: Callable[[str], None]) -> Reading[None]:
        """Emit the source of one JSON value as it comes. Raises ParseError when the text ends before it does."""
        first = yield from self.blanks()
        if first not in '{["' or not first:
            yield from self._json_scalar(emit)
            return
        depth, in_string, is_escaped = 0, False, False
        while True:
            at = self._at
            while at < len(self._text):
                char = self._text[at]
                at += 1
                if in_string:
                    if is_escaped:
                        is_escaped = False
                    elif char == "\\":
                        is_escaped = True
                    elif char == '"':
                        in_string = False
                elif char == '"':
                    in_string = True
                elif char in "{[":
                    depth += 1
                elif char in "}]":
                    depth -= 1
                if depth == 0 and not in_string:
                    emit(self._take(at - self._at))
                    return
            if at > self._at:
                emit(self._take(at - self._at))
            if self._is_ended:
                raise ParseError
            yield

    def _json_scalar(self, emit: Callable[[str], None]) -> Reading[None]:
        is_empty = True
        while True:
            while self._left and self._text[self._at] not in _DIGITS_END:
                emit(self._take(1))
                is_empty = False
            if self._left or self._is_ended:
                if is_empty:
                    raise ParseError
                return
            yield


def _overlap(text: str, marker: str) -> int:
    """Characters at the end of the text that begin the marker."""
    for count in range(min(len(text), len(marker) - 1), 0, -1):
        if marker.startswith(text[len(text) - count :]):
            return count
    return 0
