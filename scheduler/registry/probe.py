"""Asks an instance for its health, by gRPC's standard service."""

import asyncio
from collections.abc import Awaitable, Callable

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from xllm_compile.scheduler.cluster.state import InstanceInfo
from xllm_compile.scheduler.registry.liveness import Answer
from xllm_compile.scheduler.tls import open_channel

Probe = Callable[[InstanceInfo], Awaitable[Answer]]

TIMEOUT_S = 1.0
NUM_ATTEMPTS = 2
PAUSE_S = 0.1
_CHANNEL_OPTIONS = [
    # Channels of one address share its connection: a new one would wait out the pauses of one that failed.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
]


async def probe_health(info: InstanceInfo, credentials: grpc.ChannelCredentials | None = None) -> Answer:
    """NONE after NUM_ATTEMPTS without an answer, of TIMEOUT_S each."""
    for attempt in range(NUM_ATTEMPTS):
        if attempt:
            await asyncio.sleep(PAUSE_S)
        async with open_channel(info.address, credentials, _CHANNEL_OPTIONS) as channel:
            try:
                request = health_pb2.HealthCheckRequest()
                response = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=TIMEOUT_S)
            except grpc.aio.AioRpcError:
                continue
        is_serving = response.status == health_pb2.HealthCheckResponse.SERVING
        return Answer.SERVING if is_serving else Answer.NOT_SERVING
    return Answer.NONE
