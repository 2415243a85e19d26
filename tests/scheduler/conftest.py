from collections.abc import AsyncIterator, Iterator

import grpc.aio
import httpx
import pytest

from tests.scheduler.service_fixtures import MAX_MODEL_LEN, CountingRunner, counting_engine, instance_info
from xllm_compile.runtime.async_engine import AsyncEngine
from xllm_compile.runtime.engine_config import EngineConfig
from xllm_compile.scheduler.grpc_api import GrpcServer
from xllm_compile.scheduler.http_api import build_app
from xllm_compile.scheduler.instance_api import InstanceServicer
from xllm_compile.scheduler.proto import xllm_pb2_grpc
from xllm_compile.scheduler.service import Service


@pytest.fixture
def runner() -> CountingRunner:
    return CountingRunner()


@pytest.fixture
def engine(runner: CountingRunner) -> Iterator[AsyncEngine]:
    engine = AsyncEngine(counting_engine(runner, EngineConfig(max_waiting=6)))
    yield engine
    runner.gate.set()
    engine.shutdown()


@pytest.fixture
def service(engine: AsyncEngine) -> Service:
    return Service(
        engine=engine,
        tokenizer=engine.engine.tokenizer,
        model_names=("counter", "alias"),
        max_model_len=MAX_MODEL_LEN,
        version="1.2.3",
        max_streams=4,
        max_body_bytes=10_000,
    )


@pytest.fixture
async def client(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=build_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.fixture
async def stub(service: Service, engine: AsyncEngine) -> AsyncIterator[xllm_pb2_grpc.InstanceStub]:
    """Of the Instance service of the module's `service`, over real gRPC."""
    server = GrpcServer(service)
    port = server.bind("127.0.0.1", 0)
    server.add_instance(InstanceServicer(service, engine, instance_info(port)))
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield xllm_pb2_grpc.InstanceStub(channel)
    await server.stop(0)
