"""The gRPC service between a gateway and its instances (proto/xllm.proto, Instance). Methods carry its names."""

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from xllm_compile.runtime.async_engine import AsyncEngine
from xllm_compile.runtime.memory.prefix_cache import split_digests
from xllm_compile.runtime.reservations import MAX_TIMEOUT_S, ReservationRequest
from xllm_compile.scheduler import errors
from xllm_compile.scheduler.cluster.instance_messages import info_message, load_message
from xllm_compile.scheduler.cluster.state import InstanceInfo
from xllm_compile.scheduler.grpc_convert import reserved
from xllm_compile.scheduler.grpc_errors import abort_call
from xllm_compile.scheduler.instance_load import instance_load, step_profile
from xllm_compile.scheduler.instance_runs import InstanceRuns
from xllm_compile.scheduler.kv_stream import kv_messages
from xllm_compile.scheduler.proto import xllm_pb2, xllm_pb2_grpc
from xllm_compile.scheduler.service import Service
from xllm_compile.scheduler.watchers import Watchers

LOAD_PERIOD_S = 0.25
_PERIODS_S = (0.02, 10.0)
RESERVATION_TIMEOUT_S = 60.0


def metadata_of(context: Any) -> dict[str, str]:
    """What came with a call, as text; names are in lower case."""
    return {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}


class InstanceServicer(xllm_pb2_grpc.InstanceServicer):
    def __init__(self, service: Service, engine: AsyncEngine, info: InstanceInfo) -> None:
        """engine is the service's."""
        self.info = info
        self._service = service
        self._engine = engine
        self._watchers = Watchers(engine.release_all)

    async def GetInstanceInfo(self, request: Any, context: Any) -> Any:
        return info_message(self.info, is_ready=self._service.is_ready)

    async def Run(self, request_iterator: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async with aclosing(InstanceRuns(self._service, self._engine).messages(request_iterator)) as messages:
            async for message in messages:
                yield message

    async def WatchLoad(self, request: Any, context: Any) -> AsyncIterator[Any]:
        wanted_s = request.period_ms / 1e3 or LOAD_PERIOD_S
        period_s = min(max(wanted_s, _PERIODS_S[0]), _PERIODS_S[1])
        with self._watchers.watching(request.watcher):
            while True:
                yield self._load()
                await asyncio.sleep(period_s)

    def _load(self) -> Any:
        ttft_s, tpot_s = self._service.latency.means(time.monotonic())
        load = instance_load(
            self._engine.stats(),
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            is_draining=self._service.is_draining,
            profile=step_profile(self._engine.engine.predicted_s, self.info.max_num_batched_tokens),
        )
        return load_message(load, incarnation=self.info.incarnation)

    async def WatchKv(self, request: Any, context: Any) -> AsyncIterator[Any]:
        engine = self._engine.engine
        messages = kv_messages(engine.kv_log, engine.kv_digests, request, incarnation=self.info.incarnation)
        async with aclosing(messages):
            async for message in messages:
                yield message

    async def Reserve(self, request: Any, context: Any) -> Any:
        try:
            with self._service.tracing.request("xllm.v1.Instance/Reserve", metadata_of(context)) as span:
                found = await self._reserve(request)
                span.set(
                    {"xllm.kv.num_tokens": len(request.token_ids), "xllm.kv.num_cached_tokens": found.num_cached_tokens}
                )
                return found
        except Exception as err:
            return await abort_call(context, err)

    async def _reserve(self, request: Any) -> Any:
        if self._service.is_draining:
            raise errors.draining()
        self._check_fits(request)
        timeout_s = request.timeout_ms / 1e3 or RESERVATION_TIMEOUT_S
        if timeout_s > MAX_TIMEOUT_S:
            message = f"timeout_ms={request.timeout_ms} is above {MAX_TIMEOUT_S * 1e3:g}; reserve again to renew it."
            raise errors.invalid(message, param="timeout_ms")
        if not request.reservation_id:
            raise errors.invalid(
                "reservation_id must be set; take a new one for each sequence.", param="reservation_id"
            )
        tpot_slo_s = request.tpot_slo_ms / 1e3 if request.HasField("tpot_slo_ms") else math.inf
        if not tpot_slo_s > 0:
            raise errors.invalid(
                f"tpot_slo_ms={request.tpot_slo_ms:g} must be positive; leave it out for none.", param="tpot_slo_ms"
            )
        wanted = ReservationRequest(
            reservation_id=request.reservation_id,
            token_ids=tuple(request.token_ids),
            timeout_s=timeout_s,
            holder=request.watcher,
            tpot_slo_s=tpot_slo_s,
            max_output_tokens=request.max_output_tokens or math.inf,
        )
        found = await self._engine.reserve(wanted)
        return xllm_pb2.Reservation(
            reservation_id=found.reservation_id,
            incarnation=self.info.incarnation,
            transfers=found.transfers,
            token=found.token,
            num_cached_tokens=found.num_cached_tokens,
            page_offsets=found.page_offsets,
            page_bytes=found.page_bytes,
            num_tokens=found.num_tokens,
            host=self.info.host,
        )

    def _check_fits(self, request: Any) -> None:
        """KV of other weights, or cut otherwise, is of no use here."""
        for name in ("weights_key", "kv_layout"):
            wanted, own = getattr(request, name), getattr(self.info, name)
            if wanted != own:
                message = (
                    f"KV of {name}='{wanted}' does not fit instance '{self.info.name}', which has '{own}'; hand over"
                    " between instances of one artifact."
                )
                raise errors.ApiError(errors.PRECONDITION, message, param=name, code="kv_mismatch")

    async def SendPrefix(self, request: Any, context: Any) -> Any:
        try:
            target = reserved(request.reservation)
            digests = split_digests(request.digests)
            return xllm_pb2.SendPrefixResponse(num_kv_tokens=await self._engine.send_prefix(digests, target))
        except Exception as err:
            return await abort_call(context, err)

    async def Release(self, request: Any, context: Any) -> Any:
        try:
            return xllm_pb2.ReleaseResponse(was_open=await self._engine.release(request.reservation_id))
        except Exception as err:
            return await abort_call(context, err)
