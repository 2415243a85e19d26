"""Instances with counting engines behind real gRPC, and the gateway's side of them, on one event loop."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from tests.scheduler.service_fixtures import MAX_MODEL_LEN, CountingRunner, counting_engine
from xllm_compile.runtime.async_engine import AsyncEngine
from xllm_compile.runtime.engine import Engine
from xllm_compile.runtime.engine_config import EngineConfig
from xllm_compile.scheduler.cluster.attempts import FailoverConfig
from xllm_compile.scheduler.cluster.cluster import Cluster
from xllm_compile.scheduler.cluster.cluster_client import ClusterClient
from xllm_compile.scheduler.cluster.instance_messages import load_message
from xllm_compile.scheduler.cluster.placer import Placer
from xllm_compile.scheduler.cluster.state import Health, InstanceInfo, InstanceLoad, Role, StepProfile
from xllm_compile.scheduler.grpc_api import InferenceServicer
from xllm_compile.scheduler.instance_api import InstanceServicer
from xllm_compile.scheduler.instance_load import instance_counters
from xllm_compile.scheduler.proto import xllm_pb2_grpc
from xllm_compile.scheduler.service import Service

_incarnations = itertools.count()


class ReportingServicer(InstanceServicer):
    is_silent = False
    profile: StepProfile | None = None

    async def WatchLoad(self, request: Any, context: Any) -> AsyncIterator[Any]:
        while True:
            if not self.is_silent:
                stats = self._service.engine.stats()
                load = InstanceLoad(
                    num_running=stats.num_running,
                    num_waiting=stats.num_waiting,
                    is_draining=self._service.is_draining,
                    profile=self.profile,
                    counters=instance_counters(stats),
                )
                yield load_message(load, incarnation=self.info.incarnation)
            await asyncio.sleep(0.02)


class FakeInstance:
    """An instance but for its model, in this process."""

    servicer_class: type[ReportingServicer] = ReportingServicer

    def __init__(self, name: str, role: Role = Role.MIX, is_transferring: bool = False, **config: Any) -> None:
        self.name = name
        self.role = role
        self.is_transferring = is_transferring
        self.runner, engine = self._make_engine(EngineConfig(**config))
        self.engine = AsyncEngine(engine)
        self.service = Service(
            engine=self.engine,
            tokenizer=self.engine.engine.tokenizer,
            model_names=("counter",),
            max_model_len=MAX_MODEL_LEN,
            version="0",
        )

    def _make_engine(self, config: EngineConfig) -> tuple[Any, Engine]:
        """And its model."""
        runner = CountingRunner()
        return runner, counting_engine(runner, config, is_transferring=self.is_transferring)

    async def start(self, port: int = 0) -> None:
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.info = self._describe(str(next(_incarnations)))
        self.servicer = self.servicer_class(self.service, self.engine, self.info)
        xllm_pb2_grpc.add_InstanceServicer_to_server(self.servicer, self._server)
        xllm_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(self.service), self._server)
        await self._server.start()

    async def stop(self) -> None:
        """As a killed process looks to others."""
        await self._server.stop(None)

    async def close(self) -> None:
        await self.stop()
        self.runner.gate.set()
        await asyncio.to_thread(self.engine.shutdown)
        self.engine.engine.close()

    def _describe(self, incarnation: str) -> InstanceInfo:
        return InstanceInfo(
            name=self.name,
            incarnation=incarnation,
            role=self.role,
            address=f"127.0.0.1:{self.port}",
            transfers=self.engine.engine.transfer_addresses,
            kv_bytes_per_token=self.engine.engine.kv_bytes_per_token,
            model_names=("counter",),
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=8,
            max_num_batched_tokens=64,
            kv_tokens_total=1024,
        )


class FakeCluster:
    """Instances, and a client of them."""

    def __init__(
        self, instances: dict[str, FakeInstance], config: FailoverConfig, placer: Placer | None = None
    ) -> None:
        self.instances = instances
        self.cluster = Cluster()
        self.client = ClusterClient(self.cluster, placer=placer, config=config)

    async def start(self) -> None:
        for instance in self.instances.values():
            await instance.start()
        await self.register()
        await self.until(lambda: all(each.takes_work for each in self.cluster.instances()))

    async def register(self, *names: str) -> None:
        """Have these be the members, or all."""
        members = [self.instances[name].info for name in names or self.instances]
        await self.cluster.update([(info, Health.ACTIVE) for info in members])

    async def until(self, is_so: Any) -> None:
        async with asyncio.timeout(10):
            while not is_so():
                await self.cluster.wait_changed(1)

    async def close(self) -> None:
        await self.cluster.close()
        for instance in self.instances.values():
            await instance.close()
