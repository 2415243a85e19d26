"""The streaming client against canned answers of a server."""

import asyncio
import json
from collections.abc import Sequence

from xllm_compile.benchmarks.openai_client import StreamResult, stream_completion


def piece(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "text": text}], "usage": None}).encode() + b"\n\n"


USAGE = b"data: " + json.dumps({"choices": [], "usage": {"completion_tokens": 3}}).encode() + b"\n\n"
DONE = b"data: [DONE]\n\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def ask(head: bytes, chunks: Sequence[bytes]) -> tuple[StreamResult, bytes]:
    """The client's result, and the request the server saw."""

    async def talk() -> tuple[StreamResult, bytes]:
        seen = bytearray()

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            seen.extend(await reader.readuntil(b"\r\n\r\n"))
            length = int(next(line for line in seen.splitlines() if line.startswith(b"Content-Length")).split()[1])
            seen.extend(await reader.readexactly(length))
            writer.write(head)
            for chunk in chunks:
                writer.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
                await writer.drain()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            result = await stream_completion("127.0.0.1", port, [1, 2], 3, api_key="k")
        return result, bytes(seen)

    return asyncio.run(talk())


def test_tokens_are_timed_and_counted():
    result, request = ask(OK, [piece("a"), piece("b") + piece("c"), USAGE + DONE])
    assert result.error is None
    assert (len(result.token_times), result.num_output_tokens) == (3, 3)
    assert result.sent <= result.token_times[0] <= result.token_times[-1] <= result.ended
    assert b"Authorization: Bearer k" in request
    body = json.loads(request.partition(b"\r\n\r\n")[2])
    assert (body["prompt"], body["max_tokens"], body["ignore_eos"], body["stream"]) == ([1, 2], 3, True, True)


def test_a_refusal_is_an_error_with_its_message():
    result, _ = ask(b"HTTP/1.1 429 Too Many Requests\r\n\r\n", [b'{"error": {"message": "full"}}'])
    assert result.error is not None
    assert "429" in result.error
    assert "full" in result.error


def test_an_error_inside_the_stream():
    result, _ = ask(OK, [piece("a"), b'data: {"error": {"message": "engine died"}}\n\n', DONE])
    assert result.error is not None
    assert "engine died" in result.error


def test_a_stream_that_breaks_off():
    result, _ = ask(OK, [piece("a")])
    assert result.error == "the connection ended before the stream did"


def test_a_stream_without_tokens():
    result, _ = ask(OK, [USAGE + DONE])
    assert result.error == "the stream held no token"


def test_nobody_there():
    result = asyncio.run(stream_completion("127.0.0.1", 1, [1], 1))
    assert result.error is not None
    assert "ConnectionRefusedError" in result.error
