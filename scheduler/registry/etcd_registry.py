"""The registry in etcd 3.4 or later, or in another process's memory (registry_server.py), over gRPC.

A call that finds no answer is tried again at the next endpoint until the time is up. Writes may be repeated by that:
they are all such that a second time changes nothing, or can be told to be our own.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from xllm_compile.scheduler.proto import etcd_pb2, etcd_pb2_grpc
from xllm_compile.scheduler.registry.etcd_config import EtcdConfig
from xllm_compile.scheduler.registry.etcd_wire import change_of, entry_of, prefix_range, to_bytes
from xllm_compile.scheduler.registry.registry import (
    NO_LEASE,
    Change,
    CompactedError,
    Entry,
    Guard,
    LeaseLostError,
    RegistryDeniedError,
    RegistryError,
    RegistryUnavailableError,
    Snapshot,
)
from xllm_compile.scheduler.tls import RECONNECT_OPTIONS, explain, open_channel

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.05, 0.5
_CHANNEL_OPTIONS = [
    *RECONNECT_OPTIONS,
    # A host that vanished without a word ends a silent watch.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.max_receive_message_length", 64 << 20),
]
_STATUS = grpc.StatusCode
_DENIED = {_STATUS.PERMISSION_DENIED, _STATUS.UNAUTHENTICATED}
_STALE_TOKEN = ("invalid auth token", "revision of auth store is old")
# Etcd answers UNAVAILABLE while it has no leader, too. INTERNAL is what gRPC calls a message it wanted to send when
# the connection broke.
_TRY_AGAIN = {_STATUS.UNAVAILABLE, _STATUS.DEADLINE_EXCEEDED, _STATUS.CANCELLED, _STATUS.INTERNAL}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Endpoint:
    address: str
    channel: grpc.aio.Channel
    kv: Any
    lease: Any
    watch: Any
    auth: Any


class EtcdRegistry:
    """Of one event loop. Connects with the first call."""

    def __init__(self, config: EtcdConfig) -> None:
        """Raises ValueError when a file of the TLS options cannot be read."""
        self._config = config
        self._credentials = config.credentials()
        self._open: dict[str, _Endpoint] = {}
        self._at = 0
        self._token = ""

    async def get(self, key: str) -> Entry | None:
        request = etcd_pb2.RangeRequest(key=to_bytes(key))
        response = await self._call(lambda endpoint, **how: endpoint.kv.Range(request, **how))
        return entry_of(response.kvs[0]) if response.kvs else None

    async def snapshot(self, prefix: str) -> Snapshot:
        key, range_end = prefix_range(prefix)
        request = etcd_pb2.RangeRequest(key=key, range_end=range_end)
        response = await self._call(lambda endpoint, **how: endpoint.kv.Range(request, **how))
        return Snapshot(entries=tuple(entry_of(kv) for kv in response.kvs), revision=response.header.revision)

    async def put(self, key: str, value: bytes, *, lease_id: int = NO_LEASE, guard: Guard | None = None) -> int | None:
        if not key:
            raise ValueError("a key must not be empty")
        put = etcd_pb2.PutRequest(key=to_bytes(key), value=value, lease=lease_id)
        response = await self._write(key, etcd_pb2.RequestOp(request_put=put), guard)
        if response.succeeded:
            return int(response.header.revision)
        # An answer that was lost on the way may have been to this very put.
        kvs = response.responses[0].response_range.kvs
        is_own = bool(kvs) and lease_id != NO_LEASE and (kvs[0].value, kvs[0].lease) == (value, lease_id)
        return int(kvs[0].mod_revision) if is_own else None

    async def delete(self, key: str, *, guard: Guard | None = None) -> bool:
        delete = etcd_pb2.DeleteRangeRequest(key=to_bytes(key))
        response = await self._write(key, etcd_pb2.RequestOp(request_delete_range=delete), guard)
        return bool(response.succeeded)

    async def watch(self, prefix: str, revision: int) -> AsyncIterator[tuple[Change, ...]]:
        pause_s, is_away = _FIRST_PAUSE_S, False
        while True:
            endpoint = self._endpoint()
            try:
                async with aclosing(self._responses(endpoint, prefix, revision + 1)) as responses:
                    async for response in responses:
                        if response.created and response.header.revision < revision:
                            # Restored from a backup, or new: what happened since cannot be known.
                            back = f"the registry is at revision {response.header.revision}, and was at {revision}"
                            raise CompactedError(back)
                        if is_away:
                            logger.info("the registry at %s answers again", endpoint.address)
                        pause_s, is_away = _FIRST_PAUSE_S, False
                        if response.events:
                            changes = tuple(change_of(event) for event in response.events)
                            # Not the header's revision: it can be ahead of events that are still to come.
                            revision = changes[-1].revision
                            yield changes
                why: str | None = "it ended"
            except grpc.aio.AioRpcError as err:
                if not self._forget_token(err):
                    _raise_final(err)
                why = err.details()
            if not is_away:
                logger.warning(
                    "the registry at %s is away, watching it again when it answers: %s",
                    endpoint.address,
                    explain(why or ""),
                )
                is_away = True
            self._at += 1
            await asyncio.sleep(pause_s)
            pause_s = min(_LAST_PAUSE_S, 2 * pause_s)

    async def _responses(self, endpoint: _Endpoint, prefix: str, start_revision: int) -> AsyncGenerator[Any]:
        """Of one watch call. Raises CompactedError, and AioRpcError for whatever else ends it."""
        # A member without a leader ends such a watch instead of staying silent.
        metadata = [*await self._metadata(endpoint), ("hasleader", "true")]
        key, range_end = prefix_range(prefix)
        create = etcd_pb2.WatchCreateRequest(key=key, range_end=range_end, start_revision=start_revision)
        call = endpoint.watch.Watch(metadata=metadata)
        try:
            await _send(call, etcd_pb2.WatchRequest(create_request=create))
            async for response in call:
                if first_left := response.compact_revision:
                    raise CompactedError(f"changes since {start_revision} are gone: the first left is {first_left}")
                if response.canceled:
                    is_denied = "permission denied" in response.cancel_reason
                    code = _STATUS.PERMISSION_DENIED if is_denied else _STATUS.UNAVAILABLE
                    raise grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), response.cancel_reason)
                yield response
        finally:
            call.cancel()

    async def grant_lease(self, ttl_s: int) -> int:
        if ttl_s < 1:
            raise ValueError(f"ttl_s={ttl_s} of a lease must be at least 1")
        request = etcd_pb2.LeaseGrantRequest(TTL=ttl_s)
        response = await self._call(lambda endpoint, **how: endpoint.lease.LeaseGrant(request, **how))
        if response.error:
            raise RegistryError(f"no lease of {ttl_s} s: {response.error}")
        return int(response.ID)

    async def keep_alive(self, lease_id: int) -> None:
        async def ask(endpoint: _Endpoint, **how: Any) -> Any:
            call = endpoint.lease.LeaseKeepAlive(**how)
            try:
                await _send(call, etcd_pb2.LeaseKeepAliveRequest(ID=lease_id))
                async for response in call:
                    return response
                raise RegistryUnavailableError(f"{endpoint.address} ended the stream without an answer")
            finally:
                call.cancel()

        response = await self._call(ask)
        if response.TTL <= 0:
            raise LeaseLostError(f"lease {lease_id} has expired or was revoked")

    async def revoke_lease(self, lease_id: int) -> None:
        request = etcd_pb2.LeaseRevokeRequest(ID=lease_id)
        try:
            await self._call(lambda endpoint, **how: endpoint.lease.LeaseRevoke(request, **how))
        except LeaseLostError:
            return

    async def close(self) -> None:
        for endpoint in self._open.values():
            await endpoint.channel.close()
        self._open.clear()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _write(self, key: str, op: etcd_pb2.RequestOp, guard: Guard | None) -> Any:
        request = etcd_pb2.TxnRequest(success=[op])
        if guard is not None:
            request.compare.add(
                result=etcd_pb2.Compare.EQUAL,
                target=etcd_pb2.Compare.MOD,
                key=to_bytes(guard.key),
                mod_revision=guard.revision,
            )
            request.failure.add(request_range=etcd_pb2.RangeRequest(key=to_bytes(key)))
        return await self._call(lambda endpoint, **how: endpoint.kv.Txn(request, **how))

    async def _call(self, ask: Callable[..., Awaitable[Any]]) -> Any:
        """What the first endpoint answers that does; `ask` gets the endpoint, timeout and metadata."""
        deadline_s = time.monotonic() + self._config.timeout_s
        pause_s = _FIRST_PAUSE_S
        is_authenticated_anew = False
        while True:
            endpoint = self._endpoint()
            left_s = deadline_s - time.monotonic()
            try:
                metadata = await self._metadata(endpoint)
                return await ask(endpoint, timeout=min(left_s, self._config.attempt_timeout_s), metadata=metadata)
            except grpc.aio.AioRpcError as err:
                if self._forget_token(err) and not is_authenticated_anew:
                    is_authenticated_anew = True
                    continue
                _raise_final(err)
                if time.monotonic() + pause_s >= deadline_s:
                    where = ", ".join(self._config.endpoints)
                    raise RegistryUnavailableError(
                        f"no answer from the registry at {where} within {self._config.timeout_s:g} s: "
                        f"{explain(err.details() or '')}"
                    ) from err
            self._at += 1
            await asyncio.sleep(pause_s)
            pause_s = min(_LAST_PAUSE_S, 2 * pause_s)

    def _endpoint(self) -> _Endpoint:
        address = self._config.endpoints[self._at % len(self._config.endpoints)]
        if address not in self._open:
            channel = open_channel(address, self._credentials, _CHANNEL_OPTIONS)
            self._open[address] = _Endpoint(
                address=address,
                channel=channel,
                kv=etcd_pb2_grpc.KVStub(channel),
                lease=etcd_pb2_grpc.LeaseStub(channel),
                watch=etcd_pb2_grpc.WatchStub(channel),
                auth=etcd_pb2_grpc.AuthStub(channel),
            )
        return self._open[address]

    async def _metadata(self, endpoint: _Endpoint) -> list[tuple[str, str]]:
        if not self._config.user:
            return []
        if not self._token:
            request = etcd_pb2.AuthenticateRequest(name=self._config.user, password=self._config.password)
            response = await endpoint.auth.Authenticate(request, timeout=self._config.attempt_timeout_s)
            self._token = response.token
        return [("token", self._token)]

    def _forget_token(self, err: grpc.aio.AioRpcError) -> bool:
        """Whether a new token may help: etcd's end with time, and with its restart."""
        is_stale = bool(self._config.user) and any(text in (err.details() or "") for text in _STALE_TOKEN)
        if is_stale:
            self._token = ""
        return is_stale


async def _send(call: Any, request: Any) -> None:
    """One message of a stream that stays open: a watch ends with its requests.

    gRPC would leave a task behind for an iterator of requests whose call failed, and complain of it in the log.
    """
    # A call that has ended says why when it is read.
    with suppress(asyncio.InvalidStateError):
        await call.write(request)


def _raise_final(err: grpc.aio.AioRpcError) -> None:
    """Returns for what may be different in a moment, or elsewhere."""
    code, details = err.code(), err.details() or ""
    if code in _TRY_AGAIN:
        return
    if code is _STATUS.NOT_FOUND and "lease not found" in details:
        raise LeaseLostError(details) from err
    if "authentication is not enabled" in details:
        raise RegistryDeniedError("the registry has no authentication; leave user and password out") from err
    if "user name is empty" in details:
        raise RegistryDeniedError("the registry wants a user and a password") from err
    if code in _DENIED or "authentication failed" in details:
        raise RegistryDeniedError(f"the registry refuses the user: {details}") from err
    raise RegistryError(f"the registry answers {code.name}: {details}") from err
