"""The OpenAI HTTP API and its neighbours as an ASGI application."""

import logging
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xllm_compile.scheduler import errors
from xllm_compile.scheduler.control_api import ControlApi
from xllm_compile.scheduler.engine_errors import to_api_error
from xllm_compile.scheduler.http_io import read_body, run_while_connected, send_error, text_headers
from xllm_compile.scheduler.info_api import InfoApi
from xllm_compile.scheduler.openai_chat import handle_chat
from xllm_compile.scheduler.openai_completions import handle_completion
from xllm_compile.scheduler.openai_embeddings import handle_embeddings
from xllm_compile.scheduler.request_trace import CHAT, COMPLETION, EMBEDDINGS
from xllm_compile.scheduler.service import ClientGoneError, Service
from xllm_compile.scheduler.tokenize_api import handle_detokenize, handle_tokenize

logger = logging.getLogger(__name__)

Handler = Callable[[Service, bytes, Send], Coroutine[Any, Any, None]]

# A health probe has no key to send, and learns nothing but up or down. The page asks for the key to its data.
OPEN_PATHS = frozenset({"/health", "/dashboard"})


def build_app(service: Service, routes: Sequence[Route] = ()) -> ASGIApp:
    """The whole application; all state is the service's, but for that of further routes."""
    info = InfoApi(service)
    control = ControlApi(service)
    router = Router(
        [
            Route("/v1/completions", _Generation(service, handle_completion, COMPLETION), methods=["POST"]),
            Route("/v1/chat/completions", _Generation(service, handle_chat, CHAT), methods=["POST"]),
            Route("/v1/embeddings", _Generation(service, handle_embeddings, EMBEDDINGS), methods=["POST"]),
            Route("/v1/models", info.models),
            Route("/v1/models/{name:path}", info.model),
            Route("/tokenize", _Call(service, handle_tokenize), methods=["POST"]),
            Route("/detokenize", _Call(service, handle_detokenize), methods=["POST"]),
            Route("/pause", control.pause, methods=["POST"]),
            Route("/resume", control.resume, methods=["POST"]),
            Route("/is_paused", control.is_paused),
            Route("/sleep", control.sleep, methods=["POST"]),
            Route("/wake_up", control.wake_up, methods=["POST"]),
            Route("/is_sleeping", control.is_sleeping),
            Route("/health", info.health),
            Route("/version", info.version),
            Route("/metrics", info.metrics),
            *routes,
        ],
        redirect_slashes=False,
    )
    return _Guard(router, service)


class _Guard:
    """Outermost: asks for the API key and writes every error in OpenAI's format."""

    def __init__(self, router: Router, service: Service) -> None:
        self._router = router
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"{scope['type']} is not served")
        has_started = False

        async def tracked_send(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        # With an app in its scope the router raises HTTPException instead of answering in plain text.
        scope["app"] = self
        try:
            self._authorize(scope)
            await self._router(scope, receive, tracked_send)
        except ClientGoneError:
            return
        except HTTPException as err:
            await send_error(send, _routing_error(err, scope), list(_raw_headers(err)))
        except Exception as err:
            error = to_api_error(err)
            if error.is_sent:
                return
            if error.code == "internal_error":
                logger.exception("%s %s failed", scope["method"], scope["path"])
            if has_started:
                # Half an answer is out: only closing the connection tells the client that it is not whole.
                raise
            await send_error(send, error)

    def _authorize(self, scope: Scope) -> None:
        if scope["path"] in OPEN_PATHS:
            return
        if not self._service.is_authorized(dict(scope["headers"]).get(b"authorization")):
            message = "Incorrect API key provided; send 'Authorization: Bearer <key>'."
            raise errors.ApiError(errors.UNAUTHENTICATED, message, code="invalid_api_key")


def _routing_error(err: HTTPException, scope: Scope) -> errors.ApiError:
    target = f"{scope['method']} {scope['path']}"
    if err.status_code == 405:
        message = f"Not allowed: {target}; see the Allow header."
        return errors.ApiError(errors.METHOD_NOT_ALLOWED, message, code="method_not_allowed")
    return errors.ApiError(errors.NOT_FOUND, f"Unknown request URL: {target}.", code="unknown_url")


def _raw_headers(err: HTTPException) -> Iterator[tuple[bytes, bytes]]:
    for name, value in (err.headers or {}).items():
        yield name.lower().encode(), value.encode()


class _Generation:
    """A generation request: takes a stream before it reads the body, and stops when the client goes away."""

    def __init__(self, service: Service, handler: Handler, does: str) -> None:
        self._service = service
        self._handler = handler
        self._does = does

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._service.admit("http", f"POST {scope['path']}", self._does, text_headers(scope)):
            body = await read_body(scope, receive, self._service.max_body_bytes)
            await run_while_connected(receive, self._handler(self._service, body, send))


class _Call:
    """A request that is answered at once."""

    def __init__(self, service: Service, handler: Handler) -> None:
        self._service = service
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_body(scope, receive, self._service.max_body_bytes)
        await self._handler(self._service, body, send)
