"""How the served model marks reasoning and tool calls, and what of it one request has to expect."""

from dataclasses import dataclass
from typing import Self

from xllm_compile.runtime.structured_output import StructuredOutput
from xllm_compile.scheduler import openai_tools, reasoning, tool_formats
from xllm_compile.scheduler.chat_parser import MessageFormat
from xllm_compile.scheduler.engine_client import ServiceTokenizer
from xllm_compile.scheduler.openai_structured import structured_output
from xllm_compile.scheduler.openai_tools import ToolRequest
from xllm_compile.scheduler.openai_types import ChatCompletionRequest
from xllm_compile.scheduler.prompts import Prompt
from xllm_compile.scheduler.reasoning import ReasoningFormat
from xllm_compile.scheduler.tool_formats import ToolFormat


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatFormats:
    """None where the model has neither."""

    tools: ToolFormat | None = None
    reasoning: ReasoningFormat | None = None

    @classmethod
    def choose(cls, template: str, *, tool_call_parser: str = "auto", reasoning_parser: str = "auto") -> Self:
        """By name; "auto" reads it from the chat template, "none" leaves the text as it is."""
        return cls(
            tools=tool_formats.choose_format(tool_call_parser, template),
            reasoning=reasoning.choose_format(reasoning_parser, template),
        )

    @property
    def takes_calls_as_text(self) -> bool:
        """Whether the template wants the arguments of earlier calls as JSON text."""
        return self.tools is not None and self.tools.is_text_in_template

    def expect(self, request: ChatCompletionRequest, asked: ToolRequest, prompt: Prompt) -> MessageFormat:
        """What completions of this prompt may hold."""
        assert prompt.text is not None
        return MessageFormat(
            reasoning=None if self.reasoning is None else self.reasoning.after_prompt(prompt.text),
            shows_reasoning=request.include_reasoning is not False,
            tools=self.tools if asked.tools else None,
            parameters={tool["name"]: tool.get("parameters") or {} for tool in asked.callable},
            is_parallel=request.parallel_tool_calls is not False and not asked.is_single,
        )


def constraint(
    request: ChatCompletionRequest, asked: ToolRequest, expected: MessageFormat, tokenizer: ServiceTokenizer
) -> StructuredOutput | None:
    """The form that the request asks of its answer, after the reasoning. Raises ApiError (400)."""
    structured = structured_output(request, expected.reasoning)
    if expected.tools is None:
        return structured
    return openai_tools.tool_grammar(
        asked,
        expected.tools,
        tokenizer,
        is_parallel=expected.is_parallel,
        reasoning=expected.reasoning,
        otherwise=structured,
    )


def has_special_markers(expected: MessageFormat, tokenizer: ServiceTokenizer) -> bool:
    """Whether leaving special tokens out of the text would hide reasoning or calls from the parser."""
    markers = list(expected.tools.markers) if expected.tools is not None else []
    if expected.reasoning is not None:
        markers += [expected.reasoning.start, expected.reasoning.end]
    return any(tokenizer.token_id(marker) in tokenizer.special_token_ids for marker in markers)
