"""What a request says its answer must look like: OpenAI's response_format, vLLM's structured_outputs and guided_*."""

from collections.abc import Callable, Mapping
from typing import Any

from xllm_compile.runtime.structured_output import ReasoningText, StructuredOutput
from xllm_compile.scheduler import errors
from xllm_compile.scheduler.openai_types import SamplingFields

_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
_JSON_SCHEMA_KEYS = frozenset({"name", "description", "schema", "strict"})

Make = Callable[[Any, ReasoningText | None], StructuredOutput]


def _text(kind: Any) -> Make:
    def make(source: Any, reasoning: ReasoningText | None) -> StructuredOutput:
        if not isinstance(source, str) or not source:
            raise ValueError(f"the {kind} must be a string that is not empty")
        return StructuredOutput(kind=kind, source=source, reasoning=reasoning)

    return make


def _json_object(wanted: Any, reasoning: ReasoningText | None) -> StructuredOutput:
    if wanted is not True:
        raise ValueError("json_object must be true")
    return StructuredOutput(kind="json_object", reasoning=reasoning)


_KINDS: dict[str, Make] = {
    "json": StructuredOutput.json_schema,
    "regex": _text("regex"),
    "choice": StructuredOutput.choice,
    "grammar": _text("grammar"),
    "json_object": _json_object,
}
_COMPACT = "disable_any_whitespace"
_JSON_KINDS = ("json", "json_object")


def structured_output(request: SamplingFields, reasoning: ReasoningText | None = None) -> StructuredOutput | None:
    """None where the answer is free. Raises ApiError (400) naming the field."""
    asked = _asked(request)
    is_compact = _is_compact(request)
    if not asked and not is_compact:
        return None
    if len(asked) > 1:
        names = " and ".join(f"'{field}'" for field, _, _ in asked)
        raise errors.invalid(f"Give one of {names}: an answer has one form.", param=asked[1][0])
    if is_compact and not (asked and asked[0][1] in _JSON_KINDS):
        field = f"structured_outputs.{_COMPACT}"
        raise errors.invalid(f"'{field}' is for JSON; ask for it, by 'json' or 'response_format'.", param=field)
    ((field, kind, source),) = asked
    try:
        structured = _KINDS[kind](source, reasoning)
        return structured.compact() if is_compact else structured
    except ValueError as err:
        raise errors.invalid(f"Invalid value for '{field}': {err}.", param=field) from None


def _asked(request: SamplingFields) -> list[tuple[str, str, Any]]:
    """(field, kind, source) of each constraint."""
    asked: list[tuple[str, str, Any]] = []
    if request.response_format is not None and request.response_format.type != "text":
        asked.append(_response_format(request.response_format.type, request.response_format.json_schema))
    for field, kind in _GUIDED.items():
        if (source := getattr(request, field)) is not None:
            asked.append((field, kind, source))
    if request.structured_outputs is not None:
        for kind, source in request.structured_outputs.items():
            if source is None or kind == _COMPACT:
                continue
            if kind not in _KINDS:
                field = f"structured_outputs.{kind}"
                raise errors.invalid(f"Unknown parameter: '{field}'.", param=field, code="unknown_parameter")
            asked.append((f"structured_outputs.{kind}", kind, source))
    return asked


def _is_compact(request: SamplingFields) -> bool:
    """Whether JSON is to have no blank that it does not need."""
    given = (request.structured_outputs or {}).get(_COMPACT)
    if given is not None and not isinstance(given, bool):
        field = f"structured_outputs.{_COMPACT}"
        raise errors.invalid(f"Invalid value for '{field}': it must be true or false.", param=field)
    return bool(given)


def _response_format(kind: str, json_schema: Any) -> tuple[str, str, Any]:
    if kind == "json_object":
        return "response_format", "json_object", True
    if kind != "json_schema":
        message = f"Invalid value for 'response_format.type': '{kind}' is none of text, json_object and json_schema."
        raise errors.invalid(message, param="response_format.type")
    field = "response_format.json_schema"
    if not isinstance(json_schema, Mapping) or not isinstance(json_schema.get("schema"), Mapping):
        message = f"Missing required parameter: '{field}.schema'."
        raise errors.invalid(message, param=f"{field}.schema", code="missing_required_parameter")
    if unknown := json_schema.keys() - _JSON_SCHEMA_KEYS:
        name = f"{field}.{min(unknown)}"
        raise errors.invalid(f"Unknown parameter: '{name}'.", param=name, code="unknown_parameter")
    return f"{field}.schema", "json", dict(json_schema["schema"])
