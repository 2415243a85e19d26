"""uvicorn with bounds on what a connection may cost: how many, how long to send a request, how long not to read."""

import asyncio
import contextlib
import json
import logging
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from xllm_compile.scheduler import errors
from xllm_compile.scheduler.tls import TlsConfig

logger = logging.getLogger(__name__)

HEADER_TIMEOUT_S = 30.0
"""Longest wait for a complete request line and headers."""
STALL_TIMEOUT_S = 60.0
"""Longest time a client may leave its answer unread once all buffers are full."""
KEEP_ALIVE_S = 75
"""Idle time of a connection between two requests; above the usual 60 s of proxies, which must close first."""
LAST_REQUEST_S = 0.2
"""How long a server that stops reads on where nothing is open: a request may be on its way, or lie unread."""
BACKLOG = 4096

_MAX_HEADER_BYTES = 64 << 10


class HttpServer(uvicorn.Server):
    """Leaves signals to its owner. `ready` is set once connections are accepted."""

    def __init__(self, app: ASGIApp, *, max_connections: int, tls: TlsConfig | None = None) -> None:
        tls = tls or TlsConfig()
        super().__init__(
            uvicorn.Config(
                app,
                http=_bounded_protocol(max_connections),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                date_header=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_S,
                # The owner drains first; what is left by then is cut.
                timeout_graceful_shutdown=2,
                h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
                ssl_certfile=tls.cert_file,
                ssl_keyfile=tls.key_file,
                ssl_ca_certs=str(tls.ca_file) if tls.client_auth else None,
                ssl_cert_reqs=ssl.CERT_REQUIRED if tls.client_auth else ssl.CERT_NONE,
            )
        )
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _bounded_protocol(max_connections: int) -> type[asyncio.Protocol]:
    class BoundedProtocol(_BoundedProtocol):
        limit = max_connections

    return BoundedProtocol


class _BoundedProtocol(H11Protocol):
    limit: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.app = self._streaming(self.app)
        self._is_refused = False
        self._is_stopping = False
        self._header_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def _streaming(self, app: ASGIApp) -> ASGIApp:
        """The application, with the chunks of its streams written as they are.

        h11 would check each against the state of its connection, which a chunk does not change: that takes twice as
        long as making the chunk.
        """

        async def streaming_app(scope: Scope, receive: Receive, send: Send) -> None:
            cycle = self.cycle
            is_chunked = False

            async def send_chunk(message: Message) -> None:
                nonlocal is_chunked
                if message["type"] == "http.response.start":
                    is_chunked = _is_chunked(scope, message)
                elif is_chunked and message["body"] and message.get("more_body") and not self.flow.write_paused:
                    if not cycle.disconnected:
                        self.transport.write(b"%x\r\n%b\r\n" % (len(message["body"]), message["body"]))
                    return
                await send(message)

            await app(scope, receive, send_chunk)

        return streaming_app

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._is_refused = len(self.connections) > self.limit
        self._header_timer = self.loop.call_later(HEADER_TIMEOUT_S, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        self._stop_stall_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            # Answered only now: closing with the request unread would reset the connection, answer and all.
            self.transport.write(_refusal())
            self.transport.close()
            return
        super().data_received(data)
        if not self._is_waiting:
            self._stop_header_timer()
            self.cycle.keep_alive &= not self._is_stopping
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_TIMEOUT_S, self.transport.abort)

    @property
    def _is_waiting(self) -> bool:
        """For a request."""
        return self.cycle is None or self.cycle.response_complete

    def shutdown(self) -> None:
        """Closed at once, a client whose request nobody has read would get no answer, not even a refusal."""
        if self._is_waiting and not self._is_stopping:
            self._is_stopping = True
            self.loop.call_later(LAST_REQUEST_S, self.shutdown)
        elif not self.transport.is_closing():
            super().shutdown()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(STALL_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_stall_timer()
        super().resume_writing()

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def send_400_response(self, msg: str) -> None:
        self.transport.write(_raw_response(errors.invalid(msg, code="invalid_http")))
        self.transport.close()


def _is_chunked(scope: Scope, start: Message) -> bool:
    """Whether the body of the answer that starts so goes out in chunks."""
    has_length = any(name == b"content-length" for name, _ in start["headers"])
    return scope["http_version"] == "1.1" and scope["method"] == "POST" and start["status"] == 200 and not has_length


def _refusal() -> bytes:
    message = "Too many connections to this server; retry later or raise --max-connections."
    return _raw_response(
        errors.ApiError(errors.OVERLOADED, message, code="too_many_connections", retry_after_s=errors.RETRY_AFTER_S)
    )


def _raw_response(error: errors.ApiError) -> bytes:
    """For a connection that never got as far as the application."""
    body = json.dumps(error.body())
    retry = f"retry-after: {error.retry_after_s}\r\n" if error.retry_after_s is not None else ""
    reason = {400: "Bad Request", 429: "Too Many Requests"}[error.kind.status]
    head = f"HTTP/1.1 {error.kind.status} {reason}\r\ncontent-type: application/json\r\n{retry}"
    return f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n{body}".encode("ascii")
