"""The three registries that every test of the contract runs against."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from xllm_compile.benchmarks.etcd_process import ETCD, MISSING, EtcdProcess
from xllm_compile.scheduler.registry.etcd_config import EtcdConfig
from xllm_compile.scheduler.registry.etcd_registry import EtcdRegistry
from xllm_compile.scheduler.registry.memory_registry import MemoryRegistry
from xllm_compile.scheduler.registry.registry import Registry
from xllm_compile.scheduler.registry.registry_server import RegistryServer, served_registry


@pytest.fixture(scope="session")
def shared_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdProcess]:
    if ETCD is None:
        pytest.skip(MISSING)
    with EtcdProcess(tmp_path_factory.mktemp("etcd")) as etcd:
        yield etcd


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdProcess]:
    """One of the test's own, running; to be killed and started at will."""
    if ETCD is None:
        pytest.skip(MISSING)
    with EtcdProcess(tmp_path) as etcd:
        yield etcd


@pytest.fixture(
    params=[
        "memory",
        pytest.param("served", marks=pytest.mark.integration),
        pytest.param("etcd", marks=pytest.mark.integration),
    ]
)
async def registry(request: pytest.FixtureRequest) -> AsyncIterator[Registry]:
    match request.param:
        case "memory":
            async with MemoryRegistry() as registry:
                yield registry
        case "served":
            async with served_registry() as memory:
                server = RegistryServer(memory)
                port = await server.start("127.0.0.1", 0)
                async with EtcdRegistry(EtcdConfig(endpoints=(f"127.0.0.1:{port}",))) as client:
                    yield client
                await server.stop()
        case "etcd":
            endpoint = request.getfixturevalue("shared_etcd").endpoint
            async with EtcdRegistry(EtcdConfig(endpoints=(endpoint,))) as client:
                yield client


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """The tests of one etcd share it."""
    return f"/{request.node.name}/"
