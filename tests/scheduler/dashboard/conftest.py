import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

import pytest

from tests.scheduler.cluster.conftest import make_cluster as make_cluster
from xllm_compile.scheduler.cluster.cluster import Cluster
from xllm_compile.scheduler.dashboard.dashboard import Dashboard, DashboardConfig
from xllm_compile.scheduler.dashboard.reading import read_cluster, read_server
from xllm_compile.scheduler.http_api import build_app
from xllm_compile.scheduler.http_server import HttpServer
from xllm_compile.scheduler.service import Service


def make_dashboard(service: Service, cluster: Cluster | None = None) -> Dashboard:
    read = partial(read_server, service) if cluster is None else partial(read_cluster, service, cluster)
    config = DashboardConfig(
        title="counter", version="1.2.3", is_gateway=cluster is not None, ttft_slo_ms=200, tpot_slo_ms=20
    )
    return Dashboard(read, config)


Serve = Callable[[Service, Dashboard], AbstractAsyncContextManager[str]]


@pytest.fixture
def serve() -> Serve:
    """A server's address while entered, on the test's event loop."""

    @asynccontextmanager
    async def served(service: Service, dashboard: Dashboard) -> AsyncIterator[str]:
        with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listening:
            server = HttpServer(build_app(service, dashboard.routes()), max_connections=100)
            task = asyncio.create_task(server.serve(sockets=[listening]))
            await server.ready.wait()
            try:
                yield f"http://127.0.0.1:{listening.getsockname()[1]}"
            finally:
                server.should_exit = True
                await task

    return served
