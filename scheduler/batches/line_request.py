"""One line of a batch through the handlers of the HTTP endpoints: checks, templates and answers are theirs."""

import json
import logging
import re
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from starlette.types import Message, Send

from xllm_compile.scheduler import errors
from xllm_compile.scheduler.batches.folder import new_id
from xllm_compile.scheduler.batches.records import ENDPOINTS, Line, Result
from xllm_compile.scheduler.engine_errors import to_api_error
from xllm_compile.scheduler.openai_chat import handle_chat
from xllm_compile.scheduler.openai_completions import handle_completion
from xllm_compile.scheduler.openai_embeddings import handle_embeddings
from xllm_compile.scheduler.service import Service

logger = logging.getLogger(__name__)

Handler = Callable[[Service, bytes, Send], Coroutine[Any, Any, None]]
_HANDLERS: dict[str, Handler] = dict(zip(ENDPOINTS, (handle_chat, handle_completion, handle_embeddings), strict=True))

# Valid in JSON strings, and ends of lines to Python's splitlines and others: a JSONL file must not hold them.
_LINE_ENDS = re.compile("[\x7f-\x9f\u2028\u2029]")


class BusyError(Exception):
    """The server cannot run the line now; it is to be run again after ``retry_after_s``."""

    def __init__(self, retry_after_s: float, *, is_overloaded: bool, may_be_cause: bool = False) -> None:
        """is_overloaded: fewer lines at once would have been taken. may_be_cause: of the end of the engine."""
        super().__init__(f"busy for {retry_after_s} s")
        self.retry_after_s = retry_after_s
        self.is_overloaded = is_overloaded
        self.may_be_cause = may_be_cause


@dataclass(frozen=True, slots=True)
class Answer:
    """What the endpoint would have answered."""

    status: int
    body: bytes

    @property
    def is_error(self) -> bool:
        return self.status != 200


SERVER_ERROR = Answer(status=errors.INTERNAL.status, body=json.dumps(errors.internal().body()).encode())


LINE_LOST = Answer(
    status=errors.INTERNAL.status,
    body=json.dumps(
        errors.ApiError(
            errors.INTERNAL,
            "The server ended each time that it ran this request, which may be the cause.",
            code="request_lost",
        ).body()
    ).encode(),
)


async def ask(service: Service, endpoint: str, body: bytes) -> Answer:
    """Raises BusyError where an online client would be told to come back."""
    status, parts = 0, []

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            parts.append(message["body"])

    try:
        with service.tracing.request(f"batch {endpoint}", {}):
            await _HANDLERS[endpoint](service, body, send)
    except Exception as err:
        error = to_api_error(err)
        # What ended instance after instance is not to be tried for ever.
        is_busy = error.kind in (errors.OVERLOADED, errors.UNAVAILABLE) and error.code != "instances_lost"
        is_dead = error.code == "engine_dead"
        if is_busy or is_dead:
            retry_after_s = error.retry_after_s or errors.RETRY_AFTER_S
            raise BusyError(
                retry_after_s, is_overloaded=error.kind is errors.OVERLOADED, may_be_cause=is_dead
            ) from None
        if error.code == "internal_error" and error is not err:
            logger.exception("a request of a batch failed")
        return Answer(status=error.kind.status, body=json.dumps(error.body()).encode())
    return Answer(status=status, body=b"".join(parts))


def result_of(batch: int, line: Line, answer: Answer) -> Result:
    """The line of the output file, as OpenAI writes it. A status other than 200 goes to the error file."""
    body = _LINE_ENDS.sub(lambda match: f"\\u{ord(match[0]):04x}", answer.body.decode())
    content = (
        f'{{"id":"{new_id("batch_req_")}","custom_id":{json.dumps(line.custom_id)},"response":'
        f'{{"status_code":{answer.status},"request_id":"{uuid.uuid4().hex}","body":{body}}},"error":null}}\n'
    ).encode()
    usage = {} if answer.is_error else _usage(body)
    return Result(
        batch=batch,
        number=line.number,
        is_error=answer.is_error,
        content=content,
        input_tokens=usage.get("prompt_tokens", 0),
        cached_tokens=usage.get("prompt_tokens_details", {}).get("cached_tokens", 0),
        output_tokens=usage.get("completion_tokens", 0),
    )


def _usage(body: str) -> dict[str, Any]:
    """Found, not parsed: the rest of an answer may be megabytes of numbers, and other requests' tokens wait meanwhile.

    Inside of a string the quotes would be escaped.
    """
    at = body.rindex('"usage":') + len('"usage":')
    usage: dict[str, Any] = json.JSONDecoder().raw_decode(body, at)[0]
    return usage
