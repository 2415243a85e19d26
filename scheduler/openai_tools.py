"""The tools of a chat request: who may be called, what the template sees of them, and the grammar that enforces it."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from xllm_compile.runtime.grammar import literal
from xllm_compile.runtime.structured_output import MAX_SOURCE_CHARS, ReasoningText, StructuredOutput
from xllm_compile.scheduler import errors
from xllm_compile.scheduler.engine_client import ServiceTokenizer
from xllm_compile.scheduler.openai_types import ChatCompletionRequest, ChatMessage
from xllm_compile.scheduler.tool_formats import Tool, ToolFormat, json_rule

MAX_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_FUNCTION_KEYS = frozenset({"name", "description", "parameters", "strict"})


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolRequest:
    """Empty `tools` where none may be called."""

    tools: list[dict[str, Any]] = field(default_factory=list)
    """As the client wrote them, for the template."""
    callable: list[Tool] = field(default_factory=list)
    """Those that may be called: all, or the one that tool_choice names."""
    is_forced: bool = False
    """A call must come, and nothing else."""
    is_single: bool = False
    """One call and no more: tool_choice names its function."""


def tool_request(request: ChatCompletionRequest) -> ToolRequest:
    """Raises ApiError (400) naming the bad field."""
    tools = check_tools(request.tools)
    choice = request.tool_choice
    if choice is None or choice == "auto":
        return ToolRequest(tools=tools, callable=[tool["function"] for tool in tools])
    if choice == "none":
        return ToolRequest()
    if not tools:
        raise errors.invalid("'tool_choice' needs 'tools'.", param="tool_choice")
    if choice == "required":
        return ToolRequest(tools=tools, callable=[tool["function"] for tool in tools], is_forced=True)
    name = _chosen_name(choice)
    chosen = [tool["function"] for tool in tools if tool["function"]["name"] == name]
    if not chosen:
        raise errors.invalid(f"'tool_choice' names '{name}', which is not among the tools.", param="tool_choice")
    return ToolRequest(tools=tools, callable=chosen, is_forced=True, is_single=True)


def _chosen_name(choice: Any) -> str:
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        message = (
            "Invalid value for 'tool_choice': expected none, auto, required or "
            '{"type": "function", "function": {"name": string}}.'
        )
        raise errors.invalid(message, param="tool_choice")
    return name


def check_tools(tools: Any) -> list[dict[str, Any]]:
    """The `tools` of a request, none where there are none. Raises ApiError (400) naming the bad field."""
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise errors.invalid("Invalid type for 'tools': expected an array.", param="tools", code="invalid_type")
    if len(tools) > MAX_TOOLS:
        raise errors.invalid(f"'tools' has {len(tools)} tools, at most {MAX_TOOLS} are taken.", param="tools")
    names: set[str] = set()
    for at, tool in enumerate(tools):
        name = _check_tool(tool, f"tools[{at}]")
        if name in names:
            raise errors.invalid(f"'tools[{at}].function.name': '{name}' is there twice.", param="tools")
        names.add(name)
    return tools


def _check_tool(tool: Any, where: str) -> str:
    if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
        message = f'Invalid value for \'{where}\': expected {{"type": "function", "function": {{...}}}}.'
        raise errors.invalid(message, param=where)
    function = tool["function"]
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        message = f"'{where}.function.name' must have 1 to 64 of the characters a-z, A-Z, 0-9, '_', '-' and '.'."
        raise errors.invalid(message, param=f"{where}.function.name")
    if unknown := function.keys() - _FUNCTION_KEYS:
        param = f"{where}.function.{min(unknown)}"
        raise errors.invalid(f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")
    if not isinstance(function.get("parameters") or {}, dict):
        param = f"{where}.function.parameters"
        raise errors.invalid(f"Invalid type for '{param}': expected an object.", param=param, code="invalid_type")
    return name


def _check_parameters(tool: Tool) -> None:
    """What the grammars of calls rest on; all else of a schema is for its compiler. Raises ApiError (400)."""
    parameters = tool.get("parameters") or {}
    properties, required = parameters.get("properties", {}), parameters.get("required", [])
    wrong = None
    if parameters.get("type", "object") != "object":
        wrong = f"'type' must be 'object', not {parameters['type']!r:.100}"
    elif not isinstance(properties, dict) or not all(isinstance(each, dict | bool) for each in properties.values()):
        wrong = "'properties' must be an object of JSON schemas"
    elif not isinstance(required, list) or not all(isinstance(each, str) for each in required):
        wrong = "'required' must be an array of strings"
    if wrong is not None:
        message = f"The parameters of the tool '{tool['name']}' cannot be enforced: {wrong}."
        raise errors.invalid(message, param="tools")


def check_format(asked: ToolRequest, tool_format: ToolFormat | None) -> None:
    """Raises ApiError (400) where calls of this model could not be told from text."""
    if asked.tools and tool_format is None:
        message = (
            "The model's chat template has no known format of tool calls; start the server with --tool-call-parser, "
            "or send tool_choice 'none'."
        )
        raise errors.invalid(message, param="tools", code="unsupported_parameter")


def tool_grammar(
    asked: ToolRequest,
    tool_format: ToolFormat,
    tokenizer: ServiceTokenizer,
    *,
    is_parallel: bool,
    reasoning: ReasoningText | None,
    otherwise: StructuredOutput | None,
) -> StructuredOutput | None:
    """Forced calls; or, where the answer must have a form, calls or an answer of that form. None leaves all free.

    Raises ApiError (400) when the tools are too large for a grammar.
    """
    if not asked.is_forced and (otherwise is None or not asked.callable):
        return otherwise
    for tool in asked.callable:
        _check_parameters(tool)
    calls = tool_format.calls(asked.callable, is_parallel, lambda text: literal(text, tokenizer))
    if asked.is_forced:
        source = f"start: calls\n{calls}\n"
    else:
        assert otherwise is not None
        source = f"start: calls | answer\n{calls}\nanswer: {_json_answer(otherwise)}\n"
    try:
        return StructuredOutput(kind="grammar", source=source, reasoning=reasoning)
    except ValueError:
        message = f"The tools' schemas are too large to be enforced: at most {MAX_SOURCE_CHARS} characters in all."
        raise errors.invalid(message, param="tools") from None


def _json_answer(structured: StructuredOutput) -> str:
    if (schema := structured.schema) is not None:
        return json_rule(schema)
    message = f"A {structured.kind} cannot be combined with tools; send tool_choice 'none' or 'required'."
    raise errors.invalid(message, param="tools")


def message_calls(message: ChatMessage, where: str, *, as_text: bool) -> list[dict[str, Any]]:
    """The tool_calls of an earlier message for the template. as_text leaves the arguments JSON text.

    Raises ApiError (400) naming the bad field.
    """
    if not isinstance(message.tool_calls, list):
        raise errors.invalid(f"Invalid type for '{where}.tool_calls': expected an array.", param=f"{where}.tool_calls")
    calls = []
    for at, call in enumerate(message.tool_calls):
        here = f"{where}.tool_calls[{at}]"
        function = call.get("function") if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str):
            message_text = f"Missing required parameter: '{here}.function.name'."
            raise errors.invalid(message_text, param=here, code="missing_required_parameter")
        arguments = _call_arguments(function, here)
        shown = json.dumps(arguments, ensure_ascii=False) if as_text else arguments
        calls.append({**call, "type": "function", "function": {"name": name, "arguments": shown}})
    return calls


def _call_arguments(function: Any, where: str) -> Any:
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            arguments = None
    if not isinstance(arguments, dict):
        param = f"{where}.function.arguments"
        raise errors.invalid(f"'{param}' must be the JSON text of an object.", param=param)
    return arguments
