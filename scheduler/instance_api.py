"""The gRPC service between a gateway and its instances (proto/xllm.proto, Instance). Methods carry its names."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from xllm_compile.scheduler.instance_runs import InstanceRuns
from xllm_compile.scheduler.proto import xllm_pb2_grpc
from xllm_compile.scheduler.service import Service


class InstanceServicer(xllm_pb2_grpc.InstanceServicer):
    def __init__(self, service: Service) -> None:
        self._service = service

    async def Run(self, request_iterator: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async with aclosing(InstanceRuns(self._service).messages(request_iterator)) as messages:
            async for message in messages:
                yield message
