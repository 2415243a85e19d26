"""An instance as far as the registry sees one: it registers and answers health probes. Ends with its standard input.

Arguments: endpoint of the registry, port, incarnation.
"""

import asyncio
import sys

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tests.scheduler.registry.instances import instance
from xllm_compile.scheduler.registry.etcd_config import EtcdConfig
from xllm_compile.scheduler.registry.etcd_registry import EtcdRegistry
from xllm_compile.scheduler.registry.registration import Registration


async def main(endpoint: str, port: str, incarnation: str) -> None:
    server = grpc.aio.server()
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    info = instance(incarnation=incarnation, address=f"127.0.0.1:{port}")
    async with EtcdRegistry(EtcdConfig(endpoints=(endpoint,))) as registry, Registration(registry, info, ttl_s=2):
        await asyncio.to_thread(sys.stdin.read)
    await servicer.enter_graceful_shutdown()
    await server.stop(0)


asyncio.run(main(*sys.argv[1:]))
