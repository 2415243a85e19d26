"""One serving process: both servers on one event loop, from the ready line to the last answer."""

import asyncio
import gc
import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

from starlette.routing import Route

from xllm_compile.scheduler.batches.api import BatchApi, disabled_routes
from xllm_compile.scheduler.batches.batches import Batches
from xllm_compile.scheduler.grpc_api import GrpcServer
from xllm_compile.scheduler.http_api import build_app
from xllm_compile.scheduler.http_server import HttpServer
from xllm_compile.scheduler.instance_api import InstanceServicer
from xllm_compile.scheduler.service import Service
from xllm_compile.scheduler.tls import TlsConfig

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)

# After the engine is done the last bytes still travel through the event loop.
_FLUSH_TIMEOUT_S = 5.0
_GRPC_GRACE_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    host: str = "127.0.0.1"
    grpc_port: int = 8001
    """0 lets the system choose."""
    max_connections: int = 16384
    """Open HTTP connections; one more is answered 429 and closed."""
    drain_timeout_s: float = 30.0
    """Longest time running requests get to finish after the first signal."""
    tls: TlsConfig = field(default_factory=TlsConfig)

    def __post_init__(self) -> None:
        if self.max_connections < 1:
            raise ValueError(f"max_connections={self.max_connections} must be at least 1")
        if self.drain_timeout_s < 0:
            raise ValueError(f"drain_timeout_s={self.drain_timeout_s} must not be negative")


class Member(Protocol):
    """The process's part in a service of many (scheduler/member.py)."""

    def servicer(self, grpc_port: int) -> InstanceServicer:
        """Called once, before `listed`."""

    def listed(self) -> AbstractAsyncContextManager[object]:
        """While it is entered, gateways send requests here."""


async def run_server(
    config: ServerConfig,
    http_socket: socket.socket,
    service: Service,
    on_ready: Callable[[int, int], None],
    *,
    routes: Sequence[Route] = (),
    batches: Batches | None = None,
    member: Member | None = None,
) -> bool:
    """Serve until SIGTERM or SIGINT, then drain. True when every open request was answered in full.

    on_ready gets the HTTP and gRPC ports once both answer. A member is listed from then on, until the drain begins.
    routes are HTTP's beside the service's own; batches run while the server does. A second signal ends the process at
    once. Raises OSError when the gRPC port is taken.
    """
    stop = _catch_signals()
    batch_routes = disabled_routes() if batches is None else BatchApi(batches).routes()
    http = HttpServer(
        build_app(service, [*routes, *batch_routes]), max_connections=config.max_connections, tls=config.tls
    )
    grpc = GrpcServer(service)
    grpc_port = grpc.bind(config.host, config.grpc_port, config.tls.server_credentials())
    if member is not None:
        grpc.add_instance(member.servicer(grpc_port))
    if batches is not None:
        # Before the first client can add one.
        await batches.start()
    http_task = asyncio.create_task(http.serve(sockets=[http_socket]))
    try:
        http_port = http_socket.getsockname()[1]
        await grpc.start()
        await http.ready.wait()
        # What there is now lives as long as the process: the collector need not pass over it again and again. It
        # stood still while the process started.
        gc.freeze()
        gc.enable()
        async with nullcontext() if member is None else member.listed():
            on_ready(http_port, grpc_port)
            await stop.wait()
        return await _drain(config, service, grpc, batches)
    finally:
        http.should_exit = True
        await grpc.stop(_GRPC_GRACE_S)
        await http_task
        if batches is not None:
            await batches.stop()


def _catch_signals() -> asyncio.Event:
    """An event set by the first signal; the second one ends the process."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def handle(number: signal.Signals) -> None:
        if stop.is_set():
            logger.warning("second signal (%s): stopping at once", number.name)
            # Past all cleanup: the engine thread may be inside a long step.
            os._exit(128 + number)
        logger.info("%s: draining; a second signal stops at once", number.name)
        stop.set()

    for number in _SIGNALS:
        loop.add_signal_handler(number, handle, number)
    return stop


async def _drain(config: ServerConfig, service: Service, grpc: GrpcServer, batches: Batches | None) -> bool:
    service.is_draining = True
    await grpc.announce_draining()
    num_open = service.limiter.num_open
    # Also counts requests that are still on their way to the engine.
    is_clean = await service.limiter.wait_idle(config.drain_timeout_s)
    if batches is not None:
        # Lines under way had as long as the clients' requests took. The others run when the server is back.
        await batches.stop()
    for each in service.services:
        await each.engine.drain(0.0)
    await service.limiter.wait_idle(_FLUSH_TIMEOUT_S)
    if is_clean:
        logger.info("drained %d requests", num_open)
    else:
        logger.warning("requests did not finish within --drain-timeout=%g s and were cut", config.drain_timeout_s)
    return is_clean
