from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.scheduler.batches.batch_fixtures import BatchServer
from tests.scheduler.service_fixtures import CountingRunner, counting_engine
from xllm_compile.runtime.async_engine import AsyncEngine
from xllm_compile.runtime.engine_config import EngineConfig


@pytest.fixture
def max_waiting() -> int:
    """Of the engine; offline requests have half of it."""
    return 64


@pytest.fixture
def engine(runner: CountingRunner, max_waiting: int) -> Iterator[AsyncEngine]:
    engine = AsyncEngine(counting_engine(runner, EngineConfig(max_waiting=max_waiting)))
    yield engine
    runner.gate.set()
    engine.shutdown()


@pytest.fixture
async def start(engine: AsyncEngine, tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[BatchServer]]]:
    """start(max_lines=5): a server with these limits. All of a test have one folder."""
    started: list[BatchServer] = []

    async def start_server(**options: Any) -> BatchServer:
        started.append(await BatchServer(engine, tmp_path / "batches", options).start())
        return started[-1]

    yield start_server
    for server in started:
        await server.stop()


@pytest.fixture
async def server(start: Callable[..., Awaitable[BatchServer]]) -> BatchServer:
    return await start()
