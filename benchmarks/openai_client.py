"""A small streaming client of the OpenAI completions API, on asyncio's own sockets.

It shares the machine with the server it measures, so it does as little as it can: it notes when each piece of a
stream arrived and looks inside only where it has to.
"""

import asyncio
import json
import re
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from xllm_compile.benchmarks.engine_process import TokenIds

_END = b"data: [DONE]"


@dataclass(kw_only=True, slots=True)
class StreamResult:
    """Times of one request on the monotonic clock, in seconds."""

    sent: float
    token_times: list[float] = field(default_factory=list)
    """Arrival of each piece of text: one token each, unless it ended inside a character."""
    ended: float = 0.0
    num_output_tokens: int = 0
    """What the server counted."""
    text: str = ""
    error: str | None = None
    retry_after_s: float | None = None
    """Where the server refused, and said when to come back."""

    @property
    def ttft_s(self) -> float:
        return self.token_times[0] - self.sent

    @property
    def e2e_s(self) -> float:
        return self.token_times[-1] - self.sent

    @property
    def tpot_s(self) -> float | None:
        """Mean gap after the first token; None with one token."""
        if self.num_output_tokens < 2:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (self.num_output_tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        return [after - before for before, after in zip(self.token_times, self.token_times[1:], strict=False)]


async def stream_completion(
    host: str,
    port: int,
    prompt: TokenIds,
    num_tokens: int,
    *,
    model: str | None = None,
    api_key: str | None = None,
    tls: ssl.SSLContext | None = None,
    fields: Mapping[str, Any] | None = None,
) -> StreamResult:
    """Send one prompt and read its stream to the end: exactly num_tokens, greedy. Errors are in the result.

    fields: more of the request's body.
    """
    body: dict[str, Any] = {
        "prompt": prompt,
        "max_tokens": num_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **(fields or {}),
    }
    if model is not None:
        body["model"] = model
    payload = json.dumps(body).encode()
    headers = {
        "Host": f"{host}:{port}",
        "Content-Type": "application/json",
        "Content-Length": str(len(payload)),
        "Connection": "close",
    }
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    head = "POST /v1/completions HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    result = StreamResult(sent=time.monotonic())
    try:
        # A chunk is a line of JSON with at most a few tokens of text.
        reader, writer = await asyncio.open_connection(host, port, limit=1 << 20, ssl=tls)
        try:
            writer.write(head.encode() + b"\r\n" + payload)
            await writer.drain()
            await _read_stream(reader, result)
        finally:
            writer.close()
    except (OSError, asyncio.IncompleteReadError, ValueError) as err:
        result.error = f"{type(err).__name__}: {err}"
    result.ended = time.monotonic()
    if result.error is None and not result.token_times:
        result.error = "the stream held no token"
    return result


async def _read_stream(reader: asyncio.StreamReader, result: StreamResult) -> None:
    status = (await reader.readline()).decode(errors="replace").strip()
    if status.split(" ")[1:2] != ["200"]:
        rest = await reader.read()
        result.error = f"{status}: {rest.decode(errors='replace')[-500:]}"
        if found := re.search(rb"^retry-after: *(\d+)", rest, re.IGNORECASE | re.MULTILINE):
            result.retry_after_s = float(found[1])
        return
    # Lines of the chunked encoding fall between the events and start with no "data:".
    while line := await reader.readline():
        if line.startswith(_END):
            return
        if not line.startswith(b"data: "):
            continue
        now = time.monotonic()
        event = json.loads(line[6:])
        if "error" in event:
            result.error = str(event["error"])
            return
        if event.get("usage"):
            result.num_output_tokens = event["usage"]["completion_tokens"]
        text = "".join(choice.get("text", "") for choice in event["choices"])
        if text:
            result.text += text
            result.token_times.append(now)
    if result.error is None:
        result.error = "the connection ended before the stream did"
