"""Turns a request body into its model, and pydantic's complaint into the error OpenAI would send."""

from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from xllm_compile.scheduler import errors

RequestT = TypeVar("RequestT", bound=BaseModel)

# pydantic's error type ends in _type (wrong JSON type) or _parsing; the first word is what was expected.
_EXPECTED = {
    "string": "a string",
    "int": "an integer",
    "float": "a number",
    "bool": "a boolean",
    "list": "an array",
    "dict": "an object",
    "model": "an object",
}
# Names that pydantic gives to the branches of unions and to mapping keys.
_BRANCHES = ("str", "int", "list[str]", "literal['offline']", "[key]")
_GOT = {str: "a string", bool: "a boolean", int: "an integer", float: "a number", list: "an array", dict: "an object"}


def parse_body(model: type[RequestT], body: bytes) -> RequestT:
    """Validate a JSON body. Raises ApiError (400) naming the first bad field."""
    try:
        return model.model_validate_json(body)
    except ValidationError as err:
        raise _to_api_error(err.errors(include_url=False)) from None


def _to_api_error(details: list[ErrorDetails]) -> errors.ApiError:
    same_field = [other for other in details if other["loc"][:1] == details[0]["loc"][:1]]
    # The branches of a union (str | list[str]) fail one by one; the one that got furthest is what was meant.
    detail = max(same_field, key=lambda other: len(_location(other)))
    kind, value, location = detail["type"], detail["input"], _location(detail)
    branches = [other["type"].split("_")[0] for other in same_field if _location(other) == location]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".") or None

    if kind == "json_invalid":
        reason = detail["msg"].removeprefix("Invalid JSON: ")
        return errors.invalid(f"The body is not valid JSON: {reason}.", code="invalid_json")
    if kind == "extra_forbidden":
        return errors.invalid(f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")
    if kind == "missing":
        message = f"Missing required parameter: '{param}'."
        return errors.invalid(message, param=param, code="missing_required_parameter")
    if param is None:
        return errors.invalid("The body must be a JSON object.", code="invalid_type")
    if kind.endswith(("_type", "_from_float", "_parsing")) and _EXPECTED.get(branches[0]):
        expected = " or ".join(dict.fromkeys(_EXPECTED[name] for name in branches if name in _EXPECTED))
        got = "null" if value is None else _GOT.get(type(value), type(value).__name__)
        message = f"Invalid type for '{param}': expected {expected}, but got {got} instead."
        return errors.invalid(message, param=param, code="invalid_type")
    return errors.invalid(f"Invalid value for '{param}': {detail['msg']}.", param=param)


def _location(detail: ErrorDetails) -> list[int | str]:
    """Path of the bad field, without the names pydantic gives to union branches and mapping keys."""
    return [part for part in detail["loc"] if part not in _BRANCHES]
