"""From the text of a completion to the parts of an assistant's message: reasoning, content, tool calls."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from xllm_compile.runtime.structured_output import ReasoningText
from xllm_compile.scheduler.reasoning import ReasoningSplitter
from xllm_compile.scheduler.tool_formats import ToolFormat
from xllm_compile.scheduler.tool_parser import ParsedDelta, ToolCallDelta, ToolParser


@dataclass(frozen=True, kw_only=True, slots=True)
class MessageFormat:
    """What to look for in the completions of one request. By default there is nothing but content."""

    reasoning: ReasoningText | None = None
    shows_reasoning: bool = True
    tools: ToolFormat | None = None
    """None where no tool may be called."""
    parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The tools' JSON schemas by name."""
    is_parallel: bool = True

    @property
    def is_plain(self) -> bool:
        return self.reasoning is None and self.tools is None


@dataclass(kw_only=True, slots=True)
class MessageDelta:
    """What is new of a message."""

    reasoning: str = ""
    content: str = ""
    tool_calls: list[ToolCallDelta] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.tool_calls)

    def to_dict(self) -> dict[str, Any]:
        """A delta of OpenAI's chunks."""
        delta: dict[str, Any] = {}
        if self.reasoning:
            delta["reasoning_content"] = self.reasoning
        if self.content:
            delta["content"] = self.content
        if self.tool_calls:
            delta["tool_calls"] = [_call_delta(call) for call in self.tool_calls]
        return delta


class ChatParser:
    """One completion's text in, in any pieces; what it says does not depend on where it was cut."""

    def __init__(self, expected: MessageFormat) -> None:
        self._splitter = ReasoningSplitter(expected.reasoning)
        self._shows_reasoning = expected.shows_reasoning
        self._tools = None
        if expected.tools is not None:
            self._tools = ToolParser(expected.tools.parse, expected.parameters, is_parallel=expected.is_parallel)

    @property
    def has_calls(self) -> bool:
        return self._tools is not None and self._tools.num_calls > 0

    def push(self, text: str, *, is_last: bool) -> MessageDelta:
        """More of the text. is_last also gives out what was kept back; nothing may come after it."""
        reasoning, rest = self._splitter.push(text)
        if is_last:
            late_reasoning, late_rest = self._splitter.finish()
            reasoning, rest = reasoning + late_reasoning, rest + late_rest
        found = self._push_answer(rest, is_last=is_last)
        return MessageDelta(
            reasoning=reasoning if self._shows_reasoning else "", content=found.content, tool_calls=found.tool_calls
        )

    def _push_answer(self, text: str, *, is_last: bool) -> ParsedDelta:
        if self._tools is None:
            return ParsedDelta(content=text)
        found = self._tools.push(text) if text else ParsedDelta()
        if is_last:
            late = self._tools.finish()
            found.content += late.content
            found.tool_calls = merge_calls([*found.tool_calls, *late.tool_calls])
        return found


def parse_message(text: str, expected: MessageFormat) -> MessageDelta:
    """A whole message at once."""
    return ChatParser(expected).push(text, is_last=True)


def merge_calls(deltas: list[ToolCallDelta]) -> list[ToolCallDelta]:
    """One delta per call, in order."""
    merged: dict[int, ToolCallDelta] = {}
    for delta in deltas:
        if delta.index in merged:
            merged[delta.index].arguments += delta.arguments
        else:
            merged[delta.index] = delta
    return list(merged.values())


def message_of(found: MessageDelta) -> dict[str, Any]:
    """The assistant's message in OpenAI's format, without streaming. Content is null beside calls."""
    has_answer = found.content or not (found.tool_calls or found.reasoning)
    message: dict[str, Any] = {"role": "assistant", "content": found.content if has_answer else None, "refusal": None}
    if found.reasoning:
        message["reasoning_content"] = found.reasoning
    if found.tool_calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in found.tool_calls
        ]
    return message


def _call_delta(call: ToolCallDelta) -> dict[str, Any]:
    if call.id is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}
