"""Finds tool calls in what the model writes, while it writes it: content, names and pieces of arguments.

Arguments pass through as the model wrote them; only Qwen3-Coder's XML is turned into JSON. A call that is malformed
before its name is known is content. `tool_formats.py` says which model writes which format.
"""

import json
import uuid
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from xllm_compile.scheduler.text_reader import ParseError, Reading, TextReader


@dataclass(kw_only=True, slots=True)
class ToolCallDelta:
    """What is new of one call. The first delta of a call has its id and name."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(kw_only=True, slots=True)
class ParsedDelta:
    """What is new of a message."""

    content: str = ""
    tool_calls: list[ToolCallDelta] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.content or self.tool_calls)


class ToolParser:
    """One completion's text in, deltas out. `push` and `finish` return what is new since the last call."""

    def __init__(
        self,
        parse: "Callable[[ToolParser], Generator[None, None, None]]",
        parameters: Mapping[str, Mapping[str, Any]],
        *,
        is_parallel: bool = True,
    ) -> None:
        """parameters are the tools' JSON schemas by name; is_parallel=False keeps the first call only."""
        self.reader = TextReader()
        self.parameters = parameters
        self.num_calls = 0
        self._is_parallel = is_parallel
        self._delta = ParsedDelta()
        self._blanks = ""
        """Kept back: blanks before a call and between calls are no content."""
        self._parse = parse(self)
        self._is_done = False

    def push(self, text: str) -> ParsedDelta:
        self.reader.feed(text)
        return self._advance()

    def finish(self) -> ParsedDelta:
        """The text ended."""
        self.reader.end()
        delta = self._advance()
        if not self.num_calls:
            delta.content += self._blanks
        self._blanks = ""
        return delta

    def content(self, text: str) -> None:
        kept = text.rstrip()
        if kept:
            self._delta.content += self._blanks + kept
            self._blanks = text[len(kept) :]
        else:
            self._blanks += text

    def call(self, name: str) -> None:
        self.num_calls += 1
        if self._is_wanted:
            self._blanks = ""
            new = ToolCallDelta(index=self.num_calls - 1, id=f"call_{uuid.uuid4().hex[:24]}", name=name)
            self._delta.tool_calls.append(new)

    def arguments(self, text: str) -> None:
        """More of the newest call's arguments."""
        if not self._is_wanted or not text:
            return
        calls = self._delta.tool_calls
        if calls and calls[-1].index == self.num_calls - 1:
            calls[-1].arguments += text
        else:
            calls.append(ToolCallDelta(index=self.num_calls - 1, arguments=text))

    @property
    def _is_wanted(self) -> bool:
        return self._is_parallel or self.num_calls == 1

    def _advance(self) -> ParsedDelta:
        if not self._is_done:
            try:
                next(self._parse)
            except StopIteration:
                self._is_done = True
        delta, self._delta = self._delta, ParsedDelta()
        return delta


def attempt(parser: ToolParser, opened: str, call: Reading[None]) -> Reading[bool]:
    """Read one call; what is malformed before its name is known becomes content, `opened` before it. True if it was
    a call."""
    num_before = parser.num_calls
    parser.reader.mark()
    try:
        yield from call
    except ParseError:
        if parser.num_calls == num_before:
            parser.content(opened + parser.reader.unmark())
            return False
    parser.reader.unmark()
    return True


def json_call(parser: ToolParser, *, only_known: bool = False) -> Reading[None]:
    """{"name": ..., "arguments" or "parameters": {...}}, in any order. only_known: other names are malformed."""
    reader = parser.reader
    held: list[str] = []
    has_name = has_arguments = False
    yield from reader.blanks()
    yield from reader.skip("{")
    while True:
        if (yield from reader.blanks()) == "}":
            break
        key = yield from reader.json_string()
        yield from reader.blanks()
        yield from reader.skip(":")
        if key == "name" and not has_name:
            name = yield from reader.json_string()
            if only_known and name not in parser.parameters:
                raise ParseError
            parser.call(name)
            has_name = True
            parser.arguments("".join(held))
        elif key in ("arguments", "parameters") and not has_arguments:
            has_arguments = True
            yield from _arguments(parser, parser.arguments if has_name else held.append)
        else:
            yield from reader.json_value(lambda _text: None)
        if (yield from reader.blanks()) == ",":
            yield from reader.skip(",")
    yield from reader.skip("}")
    if not has_name:
        raise ParseError
    if not has_arguments:
        parser.arguments("{}")


def _arguments(parser: ToolParser, emit: Callable[[str], None]) -> Reading[None]:
    if (yield from parser.reader.blanks()) == '"':
        # Some models write the arguments as a string that holds JSON.
        emit((yield from parser.reader.json_string()))
    else:
        yield from parser.reader.json_value(emit)


def hermes(parser: ToolParser) -> Generator[None, None, None]:
    """<tool_call>{"name": ..., "arguments": {...}}</tool_call>, as Hermes and Qwen write it."""
    while (yield from parser.reader.until("<tool_call>", parser.content)):
        if (yield from attempt(parser, "<tool_call>", json_call(parser))):
            yield from parser.reader.until("</tool_call>", lambda _text: None)


def llama3_json(parser: ToolParser) -> Generator[None, None, None]:
    """{"name": ..., "parameters": {...}} and nothing else, several with ";" between, perhaps after <|python_tag|>."""
    yield from _llama3_calls(parser)
    while (yield from parser.reader.until("<|python_tag|>", parser.content)):
        yield from _llama3_calls(parser)


def _llama3_calls(parser: ToolParser) -> Reading[None]:
    """The calls that come next, if any. JSON that names none of the tools is content."""
    reader = parser.reader
    while True:
        reader.mark()
        first = yield from reader.blanks()
        if parser.num_calls and first == ";":
            yield from reader.skip(";")
            first = yield from reader.blanks()
        opened = reader.unmark()
        if first != "{":
            parser.content(opened)
            return
        if not (yield from attempt(parser, opened, json_call(parser, only_known=True))):
            return


def qwen3_coder(parser: ToolParser) -> Generator[None, None, None]:
    """<tool_call><function=NAME><parameter=P>value</parameter></function></tool_call>, values as plain text."""
    while (yield from parser.reader.until("<tool_call>", parser.content)):
        if (yield from attempt(parser, "<tool_call>", _xml_call(parser))):
            yield from parser.reader.until("</tool_call>", lambda _text: None)


def _xml_call(parser: ToolParser) -> Reading[None]:
    reader = parser.reader
    yield from reader.blanks()
    yield from reader.skip("<function=")
    name = (yield from reader.upto(">")).strip()
    parser.call(name)
    properties = parser.parameters.get(name, {}).get("properties", {})
    separator = "{"
    try:
        while True:
            yield from reader.blanks()
            if (yield from reader.try_skip("</function>")):
                break
            yield from reader.skip("<parameter=")
            key = (yield from reader.upto(">")).strip()
            value = yield from reader.upto("</parameter>")
            schema = properties.get(key, {}) if isinstance(properties, Mapping) else {}
            parser.arguments(f"{separator}{json.dumps(key)}: {_typed(value, schema)}")
            separator = ", "
    finally:
        parser.arguments("{}" if separator == "{" else "}")


def _typed(value: str, schema: Any) -> str:
    """The text between the tags as JSON; its newlines next to the tags are layout."""
    value = value.removeprefix("\n").removesuffix("\n")
    if isinstance(schema, Mapping) and schema.get("type") != "string":
        try:
            return json.dumps(json.loads(value), ensure_ascii=False)
        except ValueError:
            pass
    return json.dumps(value, ensure_ascii=False)


CALLS_BEGIN = "<｜tool▁calls▁begin｜>"  # noqa: RUF001
CALLS_END = "<｜tool▁calls▁end｜>"  # noqa: RUF001
CALL_BEGIN = "<｜tool▁call▁begin｜>"  # noqa: RUF001
CALL_END = "<｜tool▁call▁end｜>"  # noqa: RUF001
SEPARATOR = "<｜tool▁sep｜>"  # noqa: RUF001


def deepseek(parser: ToolParser) -> Generator[None, None, None]:
    """DeepSeek V3 and R1 write "function", separator, name and a fenced block; V3.1 writes name, separator, JSON."""
    reader = parser.reader
    while (yield from reader.until(CALLS_BEGIN, parser.content)):
        opened = CALLS_BEGIN
        while (yield from reader.blanks()) and (yield from reader.try_skip(CALL_BEGIN)):
            if not (yield from attempt(parser, opened + CALL_BEGIN, _deepseek_call(parser))):
                break
            opened = ""
            yield from reader.until(CALL_END, lambda _text: None)
        else:
            yield from reader.try_skip(CALLS_END)


def _deepseek_call(parser: ToolParser) -> Reading[None]:
    reader = parser.reader
    name = yield from reader.upto(SEPARATOR)
    if name.strip() == "function":
        name = yield from reader.upto("```json")
    parser.call(name.strip())
    yield from reader.json_value(parser.arguments)
