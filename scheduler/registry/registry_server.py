"""A memory registry for other processes: it answers what etcd_registry.py asks of etcd, in etcd's own terms.

Refused with UNIMPLEMENTED is what that client does not ask: ranges that are no prefix, transactions of more than one
write, comparisons other than "the key has this revision". A watch stream has one watcher.
"""

import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, NoReturn

import grpc
import grpc.aio

from xllm_compile.scheduler.proto import etcd_pb2, etcd_pb2_grpc
from xllm_compile.scheduler.registry.etcd_wire import event_of, kv_of, prefix_of, to_key
from xllm_compile.scheduler.registry.memory_registry import MemoryRegistry
from xllm_compile.scheduler.registry.registry import CompactedError, Entry, LeaseLostError

_AUTHENTICATE = "/etcdserverpb.Auth/Authenticate"
_OPTIONS = [
    ("grpc.so_reuseport", 0),
    # Clients ask on quiet connections whether the server is there; etcd allows that every 5 s too.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5000),
    ("grpc.keepalive_permit_without_calls", 1),
]


def served_registry() -> MemoryRegistry:
    """An empty registry whose revisions begin at the clock.

    To a client that knew an earlier process's registry, at a lower revision, its changes are then gone, and it lists.
    """
    return MemoryRegistry(first_revision=time.time_ns() // 1000)


class RegistryServer:
    """Serves the registry on a port of its own."""

    def __init__(
        self,
        registry: MemoryRegistry,
        *,
        user: str = "",
        passwords: Sequence[str] = (),
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        """With a user, calls need the token that Authenticate gives for any of the passwords.

        Without credentials: no TLS.
        """
        self._credentials = credentials
        auth = _Auth(user, passwords) if user else None
        self._server = grpc.aio.server(interceptors=[auth] if auth else [], options=_OPTIONS)
        etcd_pb2_grpc.add_KVServicer_to_server(_KV(registry), self._server)
        etcd_pb2_grpc.add_WatchServicer_to_server(_Watch(registry), self._server)
        etcd_pb2_grpc.add_LeaseServicer_to_server(_Lease(registry), self._server)
        etcd_pb2_grpc.add_AuthServicer_to_server(auth or _NoAuth(), self._server)

    async def start(self, host: str, port: int) -> int:
        """Listen; port 0 lets the system choose. Returns the port. Raises OSError when it is taken."""
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if self._credentials is not None:
                port = self._server.add_secure_port(address, self._credentials)
            else:
                port = self._server.add_insecure_port(address)
        except RuntimeError as err:
            raise OSError(f"the registry cannot listen on {address}: {err}") from err
        await self._server.start()
        return port

    async def stop(self) -> None:
        await self._server.stop(None)


class _KV(etcd_pb2_grpc.KVServicer):
    def __init__(self, registry: MemoryRegistry) -> None:
        self._registry = registry

    async def Range(self, request: Any, context: Any) -> etcd_pb2.RangeResponse:
        return await self._range(request, context)

    async def Txn(self, request: Any, context: Any) -> etcd_pb2.TxnResponse:
        if sum(op.WhichOneof("request") != "request_range" for op in request.success) > 1:
            await _unimplemented(context, "a transaction of several writes")
        holds = True
        for compare in request.compare:
            if (compare.result, compare.target) != (etcd_pb2.Compare.EQUAL, etcd_pb2.Compare.MOD):
                await _unimplemented(context, "a comparison other than mod_revision == N")
            # Nothing is awaited between here and the write that lets another call in: the registry is in memory.
            entry = await self._registry.get(to_key(compare.key))
            holds = holds and (entry.revision if entry is not None else 0) == compare.mod_revision
        responses = [await self._do(op, context) for op in (request.success if holds else request.failure)]
        return etcd_pb2.TxnResponse(header=_header(self._registry), succeeded=holds, responses=responses)

    async def Compact(self, request: Any, context: Any) -> etcd_pb2.CompactionResponse:
        try:
            self._registry.compact(request.revision)
        except ValueError as err:
            await context.abort(grpc.StatusCode.OUT_OF_RANGE, str(err))
        return etcd_pb2.CompactionResponse(header=_header(self._registry))

    async def _range(self, request: Any, context: Any) -> etcd_pb2.RangeResponse:
        if not request.range_end:
            entry = await self._registry.get(to_key(request.key))
            entries: tuple[Entry, ...] = (entry,) if entry is not None else ()
        else:
            prefix = prefix_of(request.key, request.range_end)
            if prefix is None:
                await _unimplemented(context, "a range that is no prefix")
            entries = (await self._registry.snapshot(prefix)).entries
        kvs = [kv_of(entry) for entry in entries]
        return etcd_pb2.RangeResponse(header=_header(self._registry), kvs=kvs, count=len(kvs))

    async def _do(self, op: Any, context: Any) -> etcd_pb2.ResponseOp:
        match op.WhichOneof("request"):
            case "request_range":
                return etcd_pb2.ResponseOp(response_range=await self._range(op.request_range, context))
            case "request_put":
                put = op.request_put
                try:
                    await self._registry.put(to_key(put.key), put.value, lease_id=put.lease)
                except LeaseLostError:
                    await context.abort(grpc.StatusCode.NOT_FOUND, "etcdserver: requested lease not found")
                except ValueError as err:
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(err))
                return etcd_pb2.ResponseOp(response_put=etcd_pb2.PutResponse(header=_header(self._registry)))
            case "request_delete_range" if not op.request_delete_range.range_end:
                key = to_key(op.request_delete_range.key)
                was_there = await self._registry.get(key) is not None
                await self._registry.delete(key)
                response = etcd_pb2.DeleteRangeResponse(header=_header(self._registry), deleted=int(was_there))
                return etcd_pb2.ResponseOp(response_delete_range=response)
        await _unimplemented(context, "deleting a range")


class _Watch(etcd_pb2_grpc.WatchServicer):
    def __init__(self, registry: MemoryRegistry) -> None:
        self._registry = registry

    async def Watch(self, request_iterator: Any, context: Any) -> AsyncIterator[etcd_pb2.WatchResponse]:
        first = await anext(aiter(request_iterator), None)
        if first is None:
            return
        create = first.create_request
        prefix = prefix_of(create.key, create.range_end)
        if prefix is None:
            await _unimplemented(context, "watching anything but a prefix")
        yield etcd_pb2.WatchResponse(header=_header(self._registry), created=True)
        since = create.start_revision - 1 if create.start_revision else self._registry.revision
        try:
            async for changes in self._registry.watch(prefix, since):
                events = [event_of(change) for change in changes]
                yield etcd_pb2.WatchResponse(header=_header(self._registry), events=events)
        except CompactedError as err:
            yield etcd_pb2.WatchResponse(
                header=_header(self._registry),
                canceled=True,
                compact_revision=self._registry.revision,
                cancel_reason=str(err),
            )


class _Lease(etcd_pb2_grpc.LeaseServicer):
    def __init__(self, registry: MemoryRegistry) -> None:
        self._registry = registry

    async def LeaseGrant(self, request: Any, context: Any) -> etcd_pb2.LeaseGrantResponse:
        try:
            lease_id = await self._registry.grant_lease(request.TTL)
        except ValueError as err:
            await context.abort(grpc.StatusCode.OUT_OF_RANGE, str(err))
        return etcd_pb2.LeaseGrantResponse(header=_header(self._registry), ID=lease_id, TTL=request.TTL)

    async def LeaseRevoke(self, request: Any, context: Any) -> etcd_pb2.LeaseRevokeResponse:
        await self._registry.revoke_lease(request.ID)
        return etcd_pb2.LeaseRevokeResponse(header=_header(self._registry))

    async def LeaseKeepAlive(
        self, request_iterator: Any, context: Any
    ) -> AsyncIterator[etcd_pb2.LeaseKeepAliveResponse]:
        async for request in request_iterator:
            try:
                await self._registry.keep_alive(request.ID)
                ttl_s = self._registry.ttl_s(request.ID)
            except LeaseLostError:
                ttl_s = 0
            yield etcd_pb2.LeaseKeepAliveResponse(header=_header(self._registry), ID=request.ID, TTL=ttl_s)


class _NoAuth(etcd_pb2_grpc.AuthServicer):
    async def Authenticate(self, request: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "etcdserver: authentication is not enabled")


class _Auth(etcd_pb2_grpc.AuthServicer, grpc.aio.ServerInterceptor):
    """One user; the token lasts as long as the server."""

    def __init__(self, user: str, passwords: Sequence[str]) -> None:
        self._secrets = tuple(f"{user}\0{password}".encode() for password in passwords)
        self._token = secrets.token_urlsafe(32)

    async def Authenticate(self, request: Any, context: Any) -> etcd_pb2.AuthenticateResponse:
        shown = f"{request.name}\0{request.password}".encode()
        matches = [secrets.compare_digest(shown, known) for known in self._secrets]
        if not any(matches):
            text = "etcdserver: authentication failed, invalid user ID or password"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
        return etcd_pb2.AuthenticateResponse(token=self._token)

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        handler = await continuation(details)
        token = dict(details.invocation_metadata or ()).get("token", "")
        if details.method == _AUTHENTICATE or handler is None or secrets.compare_digest(token, self._token):
            return handler

        async def refuse(_: Any, context: Any) -> None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "etcdserver: invalid auth token")

        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(refuse)
        return grpc.unary_unary_rpc_method_handler(refuse, handler.request_deserializer, handler.response_serializer)


def _header(registry: MemoryRegistry) -> etcd_pb2.ResponseHeader:
    return etcd_pb2.ResponseHeader(revision=registry.revision)


async def _unimplemented(context: Any, what: str) -> NoReturn:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"this registry is in memory: it has no {what}")
    raise AssertionError("abort raises")
