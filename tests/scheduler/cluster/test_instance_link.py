import asyncio
from dataclasses import replace

import grpc.aio
import pytest

from tests.scheduler.cluster.cluster_fixtures import FakeInstance
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.scheduler.cluster.generate_messages import generate_message
from xllm_compile.scheduler.cluster.instance_link import InstanceLink
from xllm_compile.scheduler.cluster.run import InstanceLostError
from xllm_compile.scheduler.proto import xllm_pb2, xllm_pb2_grpc


class DeafServicer(xllm_pb2_grpc.InstanceServicer):
    """Takes a stream and reads nothing of it, as a process that stands still."""

    async def Run(self, request_iterator, context):
        await asyncio.Event().wait()
        yield

    async def Reserve(self, request, context):
        await asyncio.Event().wait()

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
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    link = InstanceLink(replace(instance.info, address=f"127.0.0.1:{port}"))
    await link.start()
    yield link
    await link.close()
    await server.stop(None)
    await instance.close()


async def first_response(link, name):
    request = generate_message(name, [1] * 500_000, SamplingParams(), None)
    with link.run(request) as run:
        await run.next()


async def test_a_call_does_not_outlast_the_loss_of_its_instance(deaf_link):
    """It is not found out for each call anew, by its own time."""
    asked = asyncio.create_task(deaf_link.reserve(xllm_pb2.ReserveRequest(reservation_id="r")))
    given_up = asyncio.create_task(deaf_link.reserve(xllm_pb2.ReserveRequest(reservation_id="s")))
    while len(deaf_link._calls) < 2:
        await asyncio.sleep(0.005)
    given_up.cancel()
    deaf_link._lose("it stands still")
    with pytest.raises(InstanceLostError, match="deaf: it was lost before it answered"):
        await asyncio.wait_for(asked, 10)
    with pytest.raises(asyncio.CancelledError):
        await given_up


async def test_a_request_that_cannot_be_written_is_lost_with_the_instance(deaf_link):
    """Whoever waits to be written hears of it as well."""
    tasks = [asyncio.create_task(first_response(deaf_link, str(index))) for index in range(8)]
    while deaf_link.num_open < len(tasks):
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.1)
    deaf_link._lose("it stands still")
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
    assert [type(result) for result in results] == [InstanceLostError] * len(tasks)
