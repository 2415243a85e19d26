"""Health probes against real servers."""

import socket

import grpc.aio
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tests.scheduler.registry.instances import instance
from xllm_compile.benchmarks.child_process import free_port
from xllm_compile.scheduler.registry.liveness import Answer
from xllm_compile.scheduler.registry.probe import probe_health

pytestmark = pytest.mark.integration

_STATUS = health_pb2.HealthCheckResponse


@pytest.mark.parametrize(
    ("status", "expected"), [(_STATUS.SERVING, Answer.SERVING), (_STATUS.NOT_SERVING, Answer.NOT_SERVING)]
)
async def test_what_the_instance_answers(status, expected):
    server = grpc.aio.server()
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    info = instance(address=f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    await server.start()
    await servicer.set("", status)
    assert await probe_health(info) is expected
    # A channel of before the end must not hide it, nor the end a return.
    await server.stop(0)
    assert await probe_health(info) is Answer.NONE


async def test_nobody_there():
    assert await probe_health(instance(address=f"127.0.0.1:{free_port()}")) is Answer.NONE


async def test_a_port_that_says_nothing():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert await probe_health(instance(address=f"127.0.0.1:{silent.getsockname()[1]}")) is Answer.NONE
