"""Which models write tool calls how, and grammars that make them write calls of given tools.

A grammar is llguidance's Lark: `%json` is a JSON schema inline, `rule[suffix=...]` is text up to and with the suffix.
"""

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xllm_compile.runtime.grammar import with_json_options
from xllm_compile.scheduler import tool_parser
from xllm_compile.scheduler.tool_parser import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEPARATOR, ToolParser

Tool = Mapping[str, Any]
"""{"name", "description", "parameters"}, the `function` of OpenAI's tool."""
Quote = Callable[[str], str]
"""A literal for a grammar: a text, or the id of the special token that it is."""
_DEFINITIONS = ("$defs", "definitions")


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolFormat:
    parse: Callable[[ToolParser], Generator[None, None, None]]
    calls: Callable[[Sequence[Tool], bool, Quote], str]
    """calls(tools, is_parallel, quote): Lark rules, of which `calls` is one call, or several if is_parallel."""
    markers: tuple[str, ...]
    """Texts that the parser looks for: as special tokens they must not be left out of the text."""
    is_text_in_template: bool = False
    """The template joins the arguments of earlier calls as text; others take a mapping."""


def choose_format(name: str, template: str) -> ToolFormat | None:
    """The format of that name; "auto" reads it from the chat template, and "none" has none."""
    if name == "auto":
        name = _detect(template)
    return FORMATS.get(name)


def _detect(template: str) -> str:
    if CALLS_BEGIN in template:
        return "deepseek_v3" if "```json" in template else "deepseek_v31"
    if "<function=" in template:
        return "qwen3_coder"
    if "<tool_call>" in template:
        return "hermes"
    if "<|python_tag|>" in template or ("ipython" in template and '"parameters"' in template):
        return "llama3_json"
    return "none"


def json_rule(schema: Any) -> str:
    """A JSON schema inside a grammar."""
    return "%json " + json.dumps(with_json_options(schema))


def _parameters(tool: Tool) -> dict[str, Any]:
    parameters = tool.get("parameters") or {"properties": {}, "additionalProperties": False}
    # Arguments are an object, also where their schema leaves that to be understood.
    return {"type": "object", **parameters}


def _definitions(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Where references of a part of the parameters point."""
    return {key: parameters[key] for key in _DEFINITIONS if key in parameters}


def _call_schema(tool: Tool, arguments: str) -> dict[str, Any]:
    """An object {"name": ..., arguments: {...}}. References keep pointing at the tool's own definitions."""
    parameters = _parameters(tool)
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"name": {"const": tool["name"]}, arguments: parameters},
        "required": ["name", arguments],
        "additionalProperties": False,
        **_definitions(parameters),
    }
    for key in _DEFINITIONS:
        parameters.pop(key, None)
    return schema


def _alternatives(name: str, bodies: Sequence[str]) -> str:
    """name: name_0 | name_1 | ..., and a rule for each body."""
    rules = [f"{name}_{at}: {body}" for at, body in enumerate(bodies)]
    return "\n".join([f"{name}: " + " | ".join(f"{name}_{at}" for at in range(len(bodies))), *rules])


def _hermes_calls(tools: Sequence[Tool], is_parallel: bool, quote: Quote) -> str:
    body = f'{quote("<tool_call>")} "\\n" call "\\n" {quote("</tool_call>")}'
    more = f'("\\n" {body})*' if is_parallel else ""
    return f"calls: {body} {more}\n" + _alternatives(
        "call", [json_rule(_call_schema(tool, "arguments")) for tool in tools]
    )


def _llama3_calls(tools: Sequence[Tool], is_parallel: bool, _quote: Quote) -> str:
    # Its templates ask for one call at a time, whatever the request allows.
    return "calls: call\n" + _alternatives("call", [json_rule(_call_schema(tool, "parameters")) for tool in tools])


def _qwen3_coder_calls(tools: Sequence[Tool], is_parallel: bool, quote: Quote) -> str:
    body = f'{quote("<tool_call>")} "\\n" call "</function>\\n" {quote("</tool_call>")}'
    more = f'("\\n" {body})*' if is_parallel else ""
    rules = [f"calls: {body} {more}", 'text[suffix="\\n</parameter>\\n"]: /(?s:.*)/']
    calls = []
    for at, tool in enumerate(tools):
        schema = _parameters(tool)
        required = schema.get("required", ())
        parts = [json.dumps(f"<function={tool['name']}>\n")]
        for number, (key, value) in enumerate(schema.get("properties", {}).items()):
            rule = f"value_{at}_{number}"
            opening = json.dumps(f"<parameter={key}>\n")
            rules.append(f"{rule}: {opening} {_plain_value(value, _definitions(schema))}")
            parts.append(rule if key in required else f"{rule}?")
        calls.append(" ".join(parts))
    return "\n".join([*rules, _alternatives("call", calls)])


def _plain_value(schema: Any, definitions: Mapping[str, Any]) -> str:
    """A value and its end: texts without quotes, everything else as JSON. A text's pattern is not enforced."""
    end = '"\\n</parameter>\\n"'
    if not isinstance(schema, Mapping):
        return f"{json_rule(schema)} {end}"
    choices, shortest, longest = schema.get("enum"), schema.get("minLength", 0), schema.get("maxLength")
    if isinstance(choices, list) and choices and all(isinstance(choice, str) and choice for choice in choices):
        return "(" + " | ".join(json.dumps(choice) for choice in choices) + f") {end}"
    are_lengths = isinstance(shortest, int) and isinstance(longest, int | None)
    if schema.get("type") != "string" or not are_lengths:
        # What is no length is named by the schema's compiler.
        return f"{json_rule({**schema, **definitions})} {end}"
    if longest is not None:
        return f"/(?s:.{{{shortest},{longest}}})/ {end}"
    return "text"


def _deepseek_v3_calls(tools: Sequence[Tool], is_parallel: bool, quote: Quote) -> str:
    separator = quote(SEPARATOR)
    bodies = []
    for tool in tools:
        opening = json.dumps(tool["name"] + "\n```json\n")
        bodies.append(f'"function" {separator} {opening} {json_rule(_parameters(tool))} "\\n```"')
    return _deepseek_calls(bodies, is_parallel, quote)


def _deepseek_v31_calls(tools: Sequence[Tool], is_parallel: bool, quote: Quote) -> str:
    separator = quote(SEPARATOR)
    bodies = [f"{json.dumps(tool['name'])} {separator} {json_rule(_parameters(tool))}" for tool in tools]
    return _deepseek_calls(bodies, is_parallel, quote)


def _deepseek_calls(bodies: Sequence[str], is_parallel: bool, quote: Quote) -> str:
    body = f"{quote(CALL_BEGIN)} call {quote(CALL_END)}"
    more = f'("\\n"? {body})*' if is_parallel else ""
    return f"calls: {quote(CALLS_BEGIN)} {body} {more} {quote(CALLS_END)}\n" + _alternatives("call", bodies)


_DEEPSEEK_MARKERS = (CALLS_BEGIN, CALL_BEGIN, SEPARATOR, CALL_END, CALLS_END)
_HERMES = ToolFormat(parse=tool_parser.hermes, calls=_hermes_calls, markers=("<tool_call>", "</tool_call>"))

FORMATS = {
    "hermes": _HERMES,
    "qwen25": _HERMES,
    "qwen3": _HERMES,
    "qwen3_coder": ToolFormat(
        parse=tool_parser.qwen3_coder, calls=_qwen3_coder_calls, markers=("<tool_call>", "</tool_call>")
    ),
    "llama3_json": ToolFormat(parse=tool_parser.llama3_json, calls=_llama3_calls, markers=("<|python_tag|>",)),
    "deepseek_v3": ToolFormat(
        parse=tool_parser.deepseek,
        calls=_deepseek_v3_calls,
        markers=_DEEPSEEK_MARKERS,
        is_text_in_template=True,
    ),
    "deepseek_v31": ToolFormat(
        parse=tool_parser.deepseek,
        calls=_deepseek_v31_calls,
        markers=_DEEPSEEK_MARKERS,
        is_text_in_template=True,
    ),
}
"""By the name of --tool-call-parser."""
