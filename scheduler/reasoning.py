"""Separates what a model thinks from what it answers."""

from collections.abc import Generator
from dataclasses import dataclass

from xllm_compile.runtime.structured_output import ReasoningText
from xllm_compile.scheduler.text_reader import TextReader


@dataclass(frozen=True, kw_only=True, slots=True)
class ReasoningFormat:
    """How one family of models marks its thoughts."""

    start: str = "<think>"
    end: str = "</think>"
    is_forced: bool = False
    """The model thinks without being told to, and without writing `start`."""

    def after_prompt(self, prompt: str) -> ReasoningText | None:
        """What may come first after this prompt: templates open the reasoning, or close it when it is not wanted."""
        tail = prompt.rstrip()
        if tail.endswith(self.end):
            return None
        is_open = self.is_forced or tail.endswith(self.start)
        return ReasoningText(start=self.start, end=self.end, is_open=is_open)


FORMATS = {
    "qwen3": ReasoningFormat(),
    "deepseek_r1": ReasoningFormat(is_forced=True),
    "deepseek_v3": ReasoningFormat(),
}
"""By the name of --reasoning-parser."""


def choose_format(name: str, template: str) -> ReasoningFormat | None:
    """The format of that name; "auto" reads it from the chat template, and "none" has none."""
    if name == "auto":
        # What the prompt ends with decides the rest.
        return FORMATS["qwen3"] if "<think>" in template or "</think>" in template else None
    return FORMATS.get(name)


class ReasoningSplitter:
    """One completion's text in, (reasoning, the rest) out. The blanks around the reasoning belong to neither."""

    def __init__(self, expected: ReasoningText | None) -> None:
        self._reader = TextReader()
        self._expected = expected
        self._reasoning = ""
        self._has_begun = False
        self._blanks = ""
        self._answer = ""
        self._split = self._run()
        self._is_answering = expected is None

    def push(self, text: str) -> tuple[str, str]:
        if self._is_answering:
            return "", text
        self._reader.feed(text)
        return self._advance()

    def finish(self) -> tuple[str, str]:
        """The text ended."""
        if self._is_answering:
            return "", ""
        self._reader.end()
        return self._advance()

    def _advance(self) -> tuple[str, str]:
        try:
            next(self._split)
        except StopIteration:
            self._is_answering = True
            self._answer += self._reader.rest()
        found = self._reasoning, self._answer
        self._reasoning = self._answer = ""
        return found

    def _run(self) -> Generator[None, None, None]:
        assert self._expected is not None
        self._reader.mark()
        yield from self._reader.blanks()
        has_start = yield from self._reader.try_skip(self._expected.start)
        opened = self._reader.unmark()
        if not has_start and not self._expected.is_open:
            self._answer += opened
            return
        if (yield from self._reader.until(self._expected.end, self._think)):
            yield from self._reader.blanks()

    def _think(self, text: str) -> None:
        text = self._blanks + text
        if not self._has_begun:
            text = text.lstrip()
        shown = text.rstrip()
        self._blanks = text[len(shown) :]
        self._reasoning += shown
        self._has_begun = self._has_begun or bool(shown)
