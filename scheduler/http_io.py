"""The ASGI end of a request: reading a bounded body, writing JSON and event streams, noticing a client that left."""

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

from starlette.types import Receive, Scope, Send

from xllm_compile.scheduler import errors
from xllm_compile.scheduler.engine_errors import to_api_error
from xllm_compile.scheduler.service import ClientGoneError

BODY_TIMEOUT_S = 60.0
"""Longest time a client may take to send its body: it holds a stream meanwhile."""

Headers = Sequence[tuple[bytes, bytes]]

_JSON_TYPE = (b"content-type", b"application/json")
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # nginx would collect the tokens of a second and send them at once.
    (b"x-accel-buffering", b"no"),
]
_DONE = b"data: [DONE]\n\n"


async def read_body(scope: Scope, receive: Receive, max_bytes: int) -> bytes:
    """Raises ApiError (413) before reading when Content-Length says so, else as soon as the limit is passed."""
    too_large = errors.ApiError(
        errors.TOO_LARGE, f"The body is larger than the {max_bytes} bytes this server reads.", code="body_too_large"
    )
    length = dict(scope["headers"]).get(b"content-length", b"0")
    if not length.isdigit() or int(length) > max_bytes:
        raise too_large
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > max_bytes:
                    raise too_large
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise errors.invalid(f"The body took longer than {BODY_TIMEOUT_S:g} s.", code="body_timeout") from None


def text_headers(scope: Scope) -> dict[str, str]:
    """By name in lower case, as ASGI has them."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


async def send_json(send: Send, content: Any, status: int = 200, headers: Headers = ()) -> None:
    await send_json_text(send, json.dumps(content, ensure_ascii=False, separators=(",", ":")), status, headers)


async def send_json_text(send: Send, text: str, status: int = 200, headers: Headers = ()) -> None:
    body = text.encode("utf-8", "replace")
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [_JSON_TYPE, length, *headers]})
    await send({"type": "http.response.body", "body": body})


async def send_error(send: Send, error: errors.ApiError, headers: Headers = ()) -> None:
    headers = list(headers)
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(error.retry_after_s).encode()))
    if error.kind is errors.UNAUTHENTICATED:
        headers.append((b"www-authenticate", b"Bearer"))
    if error.code == "too_many_streams":
        # Thousands of refused clients must not keep their connections.
        headers.append((b"connection", b"close"))
    await send_json(send, error.body(), error.kind.status, headers)


async def send_events(send: Send, events: AsyncGenerator[bytes, None]) -> None:
    """Write server-sent events, then [DONE].

    The status line waits for the first event, so a failure before it is an ordinary error answer. A later one is
    sent as an event, and then raised marked as sent.
    """
    async with aclosing(events):
        event = await anext(events, None)
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        try:
            while event is not None:
                await send({"type": "http.response.body", "body": event, "more_body": True})
                event = await anext(events, None)
        except Exception as err:
            error = to_api_error(err)
            data = b"data: " + json.dumps(error.body()).encode() + b"\n\n"
            await send({"type": "http.response.body", "body": data + _DONE})
            error.is_sent = True
            raise error from err
        await send({"type": "http.response.body", "body": _DONE})


async def run_while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run work to its end; cancel it and raise ClientGoneError when the client closes the connection first."""
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_wait_disconnect(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _wait_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
