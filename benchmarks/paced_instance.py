"""Instances without a model: each of their requests gets a token at a steady rate, whose text is the time it was sent.

What a gateway costs shows beside it, and not beside an engine that takes what the machine has. Run as a module it
registers, prints READY and serves until it is ended.
"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from xllm_compile.scheduler.cluster.instance_messages import load_message
from xllm_compile.scheduler.cluster.state import InstanceInfo, InstanceLoad, Role
from xllm_compile.scheduler.proto import xllm_pb2, xllm_pb2_grpc
from xllm_compile.scheduler.registry.etcd_config import EtcdConfig
from xllm_compile.scheduler.registry.etcd_registry import EtcdRegistry
from xllm_compile.scheduler.registry.registration import Registration

_INCARNATION = "paced"
_SERVERS: list[grpc.aio.Server] = []
"""A server that is forgotten stops."""


class PacedServicer(xllm_pb2_grpc.InstanceServicer):
    def __init__(self, tokens_per_s: float, phase: float) -> None:
        """phase: share of its period by which its steps come after those of phase 0."""
        self._period_s = 1 / tokens_per_s
        self._phase = phase

    async def WatchLoad(self, request: Any, context: Any) -> AsyncIterator[Any]:
        while True:
            yield load_message(InstanceLoad(), incarnation=_INCARNATION)
            await asyncio.sleep(0.25)

    async def Run(self, request_iterator: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        left: dict[str, int] = {}

        async def read() -> None:
            async for request in request_iterator:
                if request.WhichOneof("action") == "start":
                    left[request.start.request_id] = request.start.sampling.max_tokens
                else:
                    left.pop(request.cancel, None)

        reading = asyncio.create_task(read())
        due_s = (time.monotonic() // self._period_s + self._phase) * self._period_s
        try:
            while True:
                due_s += self._period_s
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                if left:
                    yield self._step(left)
        finally:
            reading.cancel()

    def _step(self, left: dict[str, int]) -> Any:
        message = xllm_pb2.RunResponse()
        for name in list(left):
            left[name] -= 1
            output = message.outputs.add(request_id=name)
            output.choices.add(text=f"{time.monotonic_ns()} ", token_ids=[1])
            if left[name] == 0:
                del left[name]
                output.choices[0].finish_reason = xllm_pb2.FINISH_REASON_LENGTH
                output.usage.completion_tokens = 1
        return message


async def serve(registry: str, tokens_per_s: float, count: int) -> None:
    """So many instances, whose steps take turns."""
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(EtcdRegistry(EtcdConfig(endpoints=(registry,))))
        for index in range(count):
            info = await _start(f"paced-{index}", PacedServicer(tokens_per_s, index / count))
            registration = await stack.enter_async_context(Registration(client, info))
            await registration.registered.wait()
        print("READY", flush=True)
        await asyncio.Event().wait()


async def _start(name: str, servicer: PacedServicer) -> InstanceInfo:
    server = grpc.aio.server()
    xllm_pb2_grpc.add_InstanceServicer_to_server(servicer, server)
    healthy = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    await healthy.set("", health_pb2.HealthCheckResponse.SERVING)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    _SERVERS.append(server)
    return InstanceInfo(
        name=name,
        incarnation=_INCARNATION,
        role=Role.MIX,
        address=f"127.0.0.1:{port}",
        max_model_len=1 << 20,
        max_num_seqs=4096,
        max_num_batched_tokens=4096,
        kv_tokens_total=1 << 30,
    )


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], float(sys.argv[2]), int(sys.argv[3])))
