"""The HTTP server on real sockets: how the chunks of a stream go out."""

import asyncio

import pytest

from xllm_compile.scheduler.http_server import HttpServer
from xllm_compile.scheduler.process import bind_socket

EVENTS = [b"data: 1\n\n", b"", b"data: 22222222222222222\n\n"]
CHUNKS = b"9\r\ndata: 1\n\n\r\n19\r\ndata: 22222222222222222\n\n\r\n0\r\n\r\n"


async def app(scope, receive, send):
    headers = [(b"content-length", b"2")] if scope["path"] == "/whole" else []
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if scope["path"] == "/whole":
        await send({"type": "http.response.body", "body": b"o", "more_body": True})
        await send({"type": "http.response.body", "body": b"k"})
        return
    for event in EVENTS:
        await send({"type": "http.response.body", "body": event, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


@pytest.fixture
async def server():
    """It serves, and where."""
    http = HttpServer(app, max_connections=8)
    with bind_socket("127.0.0.1", 0) as bound:
        serving = asyncio.create_task(http.serve(sockets=[bound]))
        await http.ready.wait()
        yield http, bound.getsockname()
        http.should_exit = True
        await serving


@pytest.fixture
async def connection(server):
    _, address = server
    reader, writer = await asyncio.open_connection(*address)
    yield reader, writer
    writer.close()


async def head(reader):
    return (await reader.readuntil(b"\r\n\r\n")).lower()


async def test_streams_and_whole_answers_on_one_connection(connection):
    reader, writer = connection
    for _ in range(2):
        writer.write(b"POST /stream HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
        assert b"transfer-encoding: chunked" in await head(reader)
        assert await reader.readexactly(len(CHUNKS)) == CHUNKS
        writer.write(b"POST /whole HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
        assert b"content-length: 2" in await head(reader)
        assert await reader.readexactly(2) == b"ok"


async def test_a_client_of_http_1_0_gets_no_chunks(connection):
    reader, writer = connection
    writer.write(b"POST /stream HTTP/1.0\r\ncontent-length: 0\r\n\r\n")
    assert b"chunked" not in await head(reader)
    assert await reader.read() == b"".join(EVENTS)


async def test_a_method_without_a_body_gets_none(connection):
    reader, writer = connection
    writer.write(b"HEAD /stream HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    await head(reader)
    assert await reader.read() == b""


REQUEST = b"POST /whole HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"


@pytest.fixture
def stopping(server):
    """Connects, and has the server stop before it has read what is sent meanwhile."""
    http, address = server

    async def connect_and_stop(sent, first=b""):
        reader, writer = await asyncio.open_connection(*address)
        if first:
            writer.write(first)
            await head(reader)
            assert await reader.readexactly(2) == b"ok"
        while not http.server_state.connections:
            await asyncio.sleep(0)
        if sent:
            writer.write(sent)
        # Without a pause between: only the kernel has what was sent.
        await http.shutdown()
        return reader, writer

    return connect_and_stop


@pytest.mark.parametrize("first", [b"", REQUEST])
async def test_a_request_that_is_unread_when_the_server_stops_is_answered(stopping, first):
    reader, writer = await stopping(REQUEST, first)
    assert b"200" in await head(reader)
    assert await reader.read() == b"ok"
    writer.close()


@pytest.mark.parametrize("sent", [b"", b"POST /whole HT"])
async def test_a_connection_without_a_request_is_closed_when_the_server_stops(stopping, sent):
    reader, writer = await stopping(sent)
    assert await reader.read() == b""
    writer.close()
