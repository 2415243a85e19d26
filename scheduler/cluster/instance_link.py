"""One instance as a gateway talks to it: its load as it reports it, and many requests on one stream."""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import grpc
import grpc.aio

from xllm_compile.scheduler import errors
from xllm_compile.scheduler.cluster.generate_messages import api_error
from xllm_compile.scheduler.cluster.instance_messages import load_of
from xllm_compile.scheduler.cluster.kv_index import KVIndex
from xllm_compile.scheduler.cluster.kv_watch import watch_kv
from xllm_compile.scheduler.cluster.run import InstanceLostError, Run
from xllm_compile.scheduler.cluster.state import InstanceInfo, InstanceLoad
from xllm_compile.scheduler.grpc_errors import api_error_of
from xllm_compile.scheduler.proto import xllm_pb2, xllm_pb2_grpc
from xllm_compile.scheduler.tasks import cancel_all
from xllm_compile.scheduler.tls import RECONNECT_OPTIONS, explain, open_channel

logger = logging.getLogger(__name__)

LOAD_PERIOD_MS = 250
# A report that is so late means that the instance, or the way to it, stands still: what it has is done elsewhere.
SILENCE_S = 3.0
# Silence is counted in parts: a gateway that itself stood still, or had no CPU, has missed one of them and no reports.
_NUM_SILENCES = 12
_RETRY_S = 0.2
_CALL_TIMEOUT_S = 5.0
# As long as an instance holds a reservation that nobody comes for.
_RELEASE_TIMEOUT_S = 60.0
_NO_TRACE: Mapping[str, str] = MappingProxyType({})
_CHANNEL_OPTIONS = (
    *RECONNECT_OPTIONS,
    ("grpc.max_receive_message_length", 64 << 20),
    # A connection whose other end vanished without a word ends long before SILENCE_S: reports keep it from being quiet,
    # and gRPC's own threads answer a ping where Python has no time for a report (grpc_api.py permits the pings).
    ("grpc.keepalive_time_ms", 500),
    ("grpc.keepalive_timeout_ms", 1_000),
    ("grpc.http2.max_pings_without_data", 0),
)


class InstanceLink:
    """Belongs to one event loop, between `start` and `close`."""

    def __init__(
        self,
        info: InstanceInfo,
        *,
        api_key: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        kv: KVIndex | None = None,
        on_report: Callable[["InstanceLink"], None] = lambda link: None,
    ) -> None:
        """kv is to know what KV the instance has.

        on_report is called after each report of the instance's load, and when it is lost.
        """
        self.info = info
        self.load = InstanceLoad()
        self.reported_s = 0.0
        """When `load` arrived, on the monotonic clock."""
        self.is_up = False
        """Whether it reports."""
        self.holder = None if kv is None else kv.add(info.name)
        """What of the index is this instance's."""
        self._watcher = uuid.uuid4().hex
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._credentials = credentials
        self._on_report = on_report
        self._is_new = True
        self._is_closed = False
        self._runs: dict[str, Run] = {}
        self._stream: _Stream | None = None
        self._calls: set[Any] = set()
        """Those that end with InstanceLostError when it is lost."""
        self._tasks: list[asyncio.Task[None]] = []
        self._num_silences = 0
        """Parts of SILENCE_S since the last report."""
        self._patience: asyncio.Timeout | None = None
        """Of who waits for a report."""

    @property
    def is_closed(self) -> bool:
        """Its instance left, or another one has its name."""
        return self._is_closed

    @property
    def num_open(self) -> int:
        """Requests of this gateway."""
        return len(self._runs)

    async def start(self) -> None:
        self._channel = open_channel(self.info.address, self._credentials, _CHANNEL_OPTIONS)
        self._instance = xllm_pb2_grpc.InstanceStub(self._channel)
        self._inference = xllm_pb2_grpc.InferenceStub(self._channel)
        self._tasks = [asyncio.create_task(self._watch_load()), asyncio.create_task(self._count_silence())]
        if self.holder is not None:
            watching = watch_kv(self._instance, self.holder, incarnation=self.info.incarnation, metadata=self._metadata)
            self._spawn(watching)

    async def close(self) -> None:
        """Its open requests end with InstanceLostError."""
        self._is_closed = True
        self._lose("it left")
        await cancel_all(self._tasks)
        if self.holder is not None:
            self.holder.close()
        await self._channel.close()

    # `trace` is the carrier of a span (tracing.py).
    async def embed(self, request: Any, trace: Mapping[str, str] = _NO_TRACE) -> Any:
        """The answer to an EmbedRequest. Raises ApiError where the instance refuses, InstanceLostError."""
        return await self._ask(self._inference.Embed, request, trace)

    async def reserve(self, request: Any, trace: Mapping[str, str] = _NO_TRACE) -> Any:
        """The Reservation for a ReserveRequest. Raises ApiError where the instance refuses, InstanceLostError.

        It is given up where this gateway goes without a word.
        """
        request.watcher = self._watcher
        try:
            return await self._ask(self._instance.Reserve, request, trace, timeout=_CALL_TIMEOUT_S)
        except (InstanceLostError, asyncio.CancelledError):
            # It may have been made all the same, and nobody will come for it.
            self.release(request.reservation_id)
            raise

    async def send_prefix(self, request: Any, timeout_s: float, trace: Mapping[str, str] = _NO_TRACE) -> Any:
        """The SendPrefixResponse. Raises ApiError where the instance refuses, InstanceLostError, also when late."""
        return await self._ask(self._instance.SendPrefix, request, trace, timeout=timeout_s)

    def release(self, reservation_id: str) -> None:
        """Give the reservation up, in the background. One that a request has taken over stays that request's."""
        if not self._is_closed:
            self._spawn(self._release(reservation_id))

    async def _release(self, reservation_id: str) -> None:
        request = xllm_pb2.ReleaseRequest(reservation_id=reservation_id)
        # An instance that does not answer now may do so before the reservation has timed out.
        with contextlib.suppress(InstanceLostError, errors.ApiError):
            self._check_open()
            options: dict[str, Any] = {"metadata": self._metadata, "timeout": _RELEASE_TIMEOUT_S}
            await self._answer(self._instance.Release(request, wait_for_ready=True, **options))

    async def _ask(self, method: Any, request: Any, trace: Mapping[str, str] = _NO_TRACE, **options: Any) -> Any:
        """The answer, unless the instance is lost before."""
        self._check_open()
        call = method(request, metadata=(*self._metadata, *trace.items()), **options)
        self._calls.add(call)
        try:
            return await self._answer(call)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if call in self._calls or (task is not None and task.cancelling()):
                raise
            raise InstanceLostError(f"{self.info.name}: it was lost before it answered") from None
        finally:
            self._calls.discard(call)

    async def _answer(self, call: Any) -> Any:
        try:
            return await call
        except grpc.aio.AioRpcError as err:
            error = api_error_of(err)
            if error is None:
                raise InstanceLostError(f"{self.info.name}: {_reason(err)}") from err
            raise error from err

    @contextlib.contextmanager
    def run(self, request: Any, trace: Mapping[str, str] = _NO_TRACE) -> Iterator[Run]:
        """A GenerateRequest there; leaving it before it is over cancels it. Raises InstanceLostError."""
        self._check_open()
        run = Run()
        name = request.request_id
        self._runs[name] = run
        try:
            self._send(
                xllm_pb2.RunRequest(
                    start=request, traceparent=trace.get("traceparent", ""), tracestate=trace.get("tracestate", "")
                )
            )
            yield run
        finally:
            del self._runs[name]
            if not run.is_over:
                self._cancel(name)

    def _check_open(self) -> None:
        if self._is_closed:
            raise InstanceLostError(f"{self.info.name}: it left")

    def hand_over(self, name: str, reservation: Any) -> None:
        """Have a request of `run` end with its KV sent there; its last response says how far that got."""
        if name in self._runs and self._stream is not None:
            target = xllm_pb2.HandOver(reservation=reservation)
            self._send(xllm_pb2.RunRequest(hand_over=xllm_pb2.RunHandOver(request_id=name, hand_over=target)))

    def abort(self, name: str) -> None:
        """End a request of `run` here: its last response says so."""
        run = self._runs.get(name)
        if run is not None:
            run.abort(name)
            self._cancel(name)

    def _cancel(self, name: str) -> None:
        # With its stream an instance has ended all that came on it.
        if self._stream is not None:
            self._send(xllm_pb2.RunRequest(cancel=name))

    def _send(self, message: Any) -> None:
        if self._stream is None:
            self._stream = stream = _Stream(self._instance.Run(metadata=self._metadata))
            stream.tasks = [self._spawn(self._write(stream)), self._spawn(self._read(stream))]
        self._stream.outbox.put_nowait(message)

    async def _write(self, stream: "_Stream") -> None:
        """Whoever has something to send does not wait for it: an instance may stand still."""
        reason = "it takes nothing more"
        try:
            while True:
                await stream.call.write(await stream.outbox.get())
        except (grpc.RpcError, asyncio.InvalidStateError) as err:
            reason = _reason(err)
        finally:
            self._lose_stream(stream, reason)

    async def _read(self, stream: "_Stream") -> None:
        reason = "it ended the stream"
        try:
            async for message in stream.call:
                for response in message.outputs:
                    run = self._runs.get(response.request_id)
                    if run is not None:
                        run.put(response)
                for failure in message.failures:
                    run = self._runs.get(failure.request_id)
                    if run is not None:
                        run.fail(api_error(failure))
        except grpc.RpcError as err:
            reason = _reason(err)
        finally:
            self._lose_stream(stream, reason)

    async def _watch_load(self) -> None:
        request = xllm_pb2.WatchLoadRequest(period_ms=LOAD_PERIOD_MS, watcher=self._watcher)
        while True:
            reason = "it ended the reports"
            try:
                reports = self._instance.WatchLoad(request, metadata=self._metadata)
                while (report := await self._soon(reports.read())) is not grpc.aio.EOF:
                    if report.incarnation != self.info.incarnation:
                        reason = "another instance has its address"
                        break
                    self.load, self.reported_s, self.is_up = load_of(report), time.monotonic(), True
                    self._is_new = False
                    self._on_report(self)
                reports.cancel()
            except TimeoutError:
                reports.cancel()
                reason = f"no report for {SILENCE_S:g} s"
            except grpc.RpcError as err:
                reason = _reason(err)
            self._lose(reason)
            await asyncio.sleep(_RETRY_S)

    async def _soon(self, reading: Awaitable[Any]) -> Any:
        """Raises TimeoutError after SILENCE_S of `_count_silence`."""
        self._num_silences = 0
        try:
            async with asyncio.timeout(None) as self._patience:
                return await reading
        finally:
            self._patience = None

    async def _count_silence(self) -> None:
        while True:
            await asyncio.sleep(SILENCE_S / _NUM_SILENCES)
            self._num_silences += 1
            if self._patience is not None and self._num_silences > _NUM_SILENCES:
                self._patience.reschedule(0)
                self._patience = None

    def _lose(self, reason: str) -> None:
        if self._is_new:
            logger.warning("instance %s at %s does not answer: %s", self.info.name, self.info.address, reason)
            self._is_new = False
        if self.is_up:
            logger.warning("instance %s is lost: %s", self.info.name, reason)
            self.is_up = False
            self._on_report(self)
        self._lose_stream(self._stream, reason)
        calls, self._calls = self._calls, set()
        for call in calls:
            call.cancel()

    def _lose_stream(self, stream: "_Stream | None", reason: str) -> None:
        if stream is None or stream is not self._stream:
            return
        self._stream = None
        stream.call.cancel()
        for task in stream.tasks:
            task.cancel()
        for run in self._runs.values():
            run.fail(InstanceLostError(f"{self.info.name}: {reason}"))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.append(task)
        task.add_done_callback(self._tasks.remove)
        return task


class _Stream:
    """One call of Run."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.outbox: asyncio.Queue[Any] = asyncio.Queue()
        self.tasks: list[asyncio.Task[None]] = []


def _reason(err: Exception) -> str:
    if isinstance(err, grpc.aio.AioRpcError):
        return f"{err.code().name} {explain(err.details() or '')}"
    return repr(err)
