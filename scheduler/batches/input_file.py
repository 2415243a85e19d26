"""The JSONL file of a batch: checked as a whole before anything runs, then read line by line."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from xllm_compile.scheduler import errors
from xllm_compile.scheduler.batches.records import Line, LineError

MAX_ERRORS = 100
"""Errors that are told of one file; reading ends there."""
MAX_CUSTOM_ID_CHARS = 512

_KEYS = ("custom_id", "method", "url", "body")


@dataclass(frozen=True, kw_only=True, slots=True)
class InputRules:
    endpoint: str
    """That all lines must have as their url."""
    max_lines: int
    max_line_bytes: int
    check_model: Callable[[str], object]
    """Raises ApiError for a model that is not served."""


@dataclass(kw_only=True, slots=True)
class CheckedInput:
    lines: list[Line] = field(default_factory=list)
    errors: list[LineError] = field(default_factory=list)
    """When there are any, nothing of the file runs."""


class _LineRefused(Exception):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


def check_input(path: Path, rules: InputRules) -> CheckedInput:
    """Reads the file once, a line at a time; blocks. What a body asks for is checked when it runs."""
    found = CheckedInput()
    first_use: dict[str, int] = {}
    with path.open("rb") as file:
        for number, offset, content in _numbered_lines(file, rules.max_line_bytes):
            try:
                custom_id = _check_line(content, rules)
                if (first := first_use.setdefault(custom_id, number)) != number:
                    message = f"The custom_id '{custom_id}' is already that of line {first}; each must be unique."
                    raise _LineRefused("duplicate_custom_id", message, "custom_id")
                if len(found.lines) == rules.max_lines:
                    message = (
                        f"The file has more than {rules.max_lines} requests, the most that this server takes in one "
                        "batch; split it, or raise --batch-max-lines."
                    )
                    found.errors.append(LineError(code="too_many_requests", message=message, line=number))
                    break
                found.lines.append(
                    Line(number=number, offset=offset, num_bytes=len(content), custom_id=custom_id),
                )
            except _LineRefused as err:
                found.errors.append(LineError(code=err.code, message=str(err), line=number, param=err.param))
                if len(found.errors) == MAX_ERRORS:
                    break
    if not found.lines and not found.errors:
        found.errors.append(LineError(code="empty_file", message="The input file has no requests."))
    return found


def _numbered_lines(file: BinaryIO, max_bytes: int) -> Iterator[tuple[int, int, bytes]]:
    """Number from 1, offset and content of lines that are not blank. Of a longer one the first max_bytes + 1 bytes."""
    number, offset = 0, 0
    while content := file.readline(max_bytes + 1):
        number += 1
        if not content.isspace():
            yield number, offset, content
        offset += len(content)
        while not content.endswith(b"\n") and (content := file.readline(max_bytes)):
            offset += len(content)


def _check_line(content: bytes, rules: InputRules) -> str:
    """Its custom_id. Raises _LineRefused."""
    if len(content) > rules.max_line_bytes:
        message = f"The line is longer than the {rules.max_line_bytes} bytes that this server reads of one request."
        raise _LineRefused("line_too_long", message)
    try:
        request = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise _LineRefused("invalid_json_line", "This line is not parseable as valid JSON in UTF-8.") from None
    if not isinstance(request, dict):
        raise _LineRefused("invalid_json_line", "This line is not a JSON object.")
    for key in _KEYS:
        if key not in request:
            raise _LineRefused("missing_required_parameter", f"Missing required parameter: '{key}'.", key)
    for key in request:
        if key not in _KEYS:
            raise _LineRefused("unknown_parameter", f"Unknown parameter: '{key[:64]}'.", key[:64])
    custom_id, body = request["custom_id"], request["body"]
    # Without control characters and halves of surrogate pairs: it is written into other files.
    if not (isinstance(custom_id, str) and 0 < len(custom_id) <= MAX_CUSTOM_ID_CHARS and custom_id.isprintable()):
        message = f"'custom_id' must be a string of 1 to {MAX_CUSTOM_ID_CHARS} printable characters."
        raise _LineRefused("invalid_value", message, "custom_id")
    if request["method"] != "POST":
        raise _LineRefused("invalid_method", "'method' must be 'POST'.", "method")
    if request["url"] != rules.endpoint:
        message = f"The url of this request is not the endpoint of the batch, '{rules.endpoint}'."
        raise _LineRefused("mismatched_url", message, "url")
    if not isinstance(body, dict):
        raise _LineRefused("invalid_type", "'body' must be an object.", "body")
    _check_body(body, rules)
    return custom_id


def _check_body(body: dict[str, Any], rules: InputRules) -> None:
    if body.get("stream"):
        message = "A batch has no stream to write to; leave 'stream' out."
        raise _LineRefused("invalid_value", message, "body.stream")
    model = body.get("model")
    if isinstance(model, str):
        try:
            rules.check_model(model)
        except errors.ApiError as err:
            raise _LineRefused(err.code or "invalid_value", err.message, "body.model") from None


def read_request(path: Path, line: Line) -> bytes:
    """The body of one request as JSON, as best effort. Blocks. Raises OSError when the file is gone."""
    with path.open("rb") as file:
        file.seek(line.offset)
        content = file.read(line.num_bytes)
    body = json.loads(content.decode("utf-8-sig"))["body"]
    # Also where it says otherwise: a batch is never worth an online request's place.
    return json.dumps(body | {"offline": True}).encode()
