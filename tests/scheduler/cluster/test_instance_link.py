import asyncio

import grpc.aio
import pytest

from tests.scheduler.cluster.cluster_fixtures import FakeInstance
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.scheduler.cluster.generate_messages import generate_message
from xllm_compile.scheduler.cluster.instance_link import InstanceLink, InstanceLostError
from xllm_compile.scheduler.proto import xllm_pb2_grpc


class DeafServicer(xllm_pb2_grpc.InstanceServicer):
    """Takes a stream and reads nothing of it, as a process that stands still."""

    async def Run(self, request_iterator, context):
        await asyncio.Event().wait()
        yield

    async def WatchLoad(self, request, context):
        await asyncio.Event().wait()
        yield


@pytest.fixture
async def deaf_link():
    server = grpc.aio.server()
    xllm_pb2_grpc.add_InstanceServicer_to_server(DeafServicer(), server)
    instance = FakeInstance("deaf")
    await instance.start()
    await instance.stop()
    instance.port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    link = InstanceLink(instance.info)
    await link.start()
    yield link
    await link.close()
    await server.stop(None)
    await instance.close()


async def first_response(link, name):
    request = generate_message(name, [1] * 500_000, SamplingParams(), None)
    with link.run(request) as run:
        await run.next()


async def test_a_request_that_cannot_be_written_is_lost_with_the_instance(deaf_link):
    """Whoever waits to be written hears of it as well."""
    tasks = [asyncio.create_task(first_response(deaf_link, str(index))) for index in range(8)]
    while deaf_link.num_open < len(tasks):
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.1)
    deaf_link._lose("it stands still")
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
    assert [type(result) for result in results] == [InstanceLostError] * len(tasks)
