"""Over TCP: the bytes follow the request on the same connection, and a checksum follows them.

Both sides work in place: the sender's thread sends from its mapped pages, the receiver's receives into the permitted
ones. (sendfile would save the sender a copy; the receiver then copies from single pages, which costs more.) The
checksum finds what TCP's own 16 bits do not.
"""

import functools
import socket
from collections.abc import Iterator, Sequence
from ipaddress import ip_address

import xxhash

from xllm_compile.runtime.transfer.client import Client
from xllm_compile.runtime.transfer.mapping import Mapping
from xllm_compile.runtime.transfer.permits import Permits, RefusedError, Write
from xllm_compile.runtime.transfer.server import Server
from xllm_compile.runtime.transfer.session import Session, WriteRequest, greet_receiver
from xllm_compile.runtime.transfer.stream import Stream
from xllm_compile.runtime.transfer.transfer import (
    ByteRange,
    Region,
    Sender,
    TransferConfig,
    TransferError,
    UnreachableError,
)

# What moves between two looks at whether the token is revoked.
_FRAME_BYTES = 2 << 20
_SMALL_BYTES = 64 << 10
_CHECKSUM_BYTES = 8
_BACKLOG = 64
# Longest wait for the peer's host, to take a connection or more bytes. Its process may take longer to answer.
_REACH_TIMEOUT_S = 3.0


def listen(config: TransferConfig) -> socket.socket:
    """Raises ValueError when strangers could reach it or peers could not, OSError when it cannot be had."""
    if config.host in ("", "0.0.0.0", "::"):
        raise ValueError(f"KV transfers cannot be sent to host {config.host!r}: name an address that peers reach")
    if not config.secret and not is_loopback(config.host):
        raise ValueError(
            f"KV transfers on {config.host} without a secret would be open to whoever reaches it; give all instances"
            " the same one, or listen on 127.0.0.1"
        )
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((config.host, config.port), family=family, backlog=_BACKLOG)
    except OSError as err:
        where = f"{config.host}:{config.port}"
        raise OSError(err.errno, f"KV transfers cannot listen on {where}: {err.strerror}") from None


def open_tcp_receiver(mapping: Mapping, permits: Permits, config: TransferConfig) -> Server:
    """Raises ValueError and OSError as `listen` does."""
    listening = listen(config)
    return Server(
        listening, tcp_address("tcp", listening), permits, config, lambda session: _TcpChannel(session.stream, mapping)
    )


def tcp_address(scheme: str, listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"{scheme}:[{host}]:{port}" if ":" in host else f"{scheme}:{host}:{port}"


def connect_tcp(address: str, region: Region, config: TransferConfig) -> Sender:
    """Raises ValueError when the address is none."""
    host_and_port(address)
    mapping = Mapping(region, is_writable=False)
    send = functools.partial(_send, mapping)
    return Client(address, region, functools.partial(connect_session, address, config), send, mapping.close)


def host_and_port(address: str) -> tuple[str, int]:
    """Of SCHEME:HOST:PORT. Raises ValueError."""
    host, _, port = address.partition(":")[2].rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"{address!r} is no address for KV transfers: it must be SCHEME:HOST:PORT")
    return host.strip("[]"), int(port)


def connect_session(address: str, config: TransferConfig) -> Session:
    """A new connection to SCHEME:HOST:PORT. Raises TransferError."""
    try:
        connection = socket.create_connection(host_and_port(address), min(_REACH_TIMEOUT_S, config.timeout_s))
    except OSError as err:
        raise UnreachableError(f"{address} cannot be reached: {err.strerror or err}; has it ended?") from None
    stream = Stream(connection, address, config.timeout_s)
    try:
        tune(stream)
        return greet_receiver(stream, config.secret)
    except BaseException:
        stream.close()
        raise


def tune(stream: Stream) -> None:
    """Small messages go at once, and a host that is gone, or cut off, is noticed."""
    stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(_REACH_TIMEOUT_S * 1000))


def _send(mapping: Mapping, session: Session, request: bytes, ranges: Sequence[ByteRange]) -> None:
    checksum = xxhash.xxh3_64()
    # What is small goes in one call with all that belongs to it.
    unsent: list[bytes | memoryview] = [request]
    num_unsent = 0
    for part in ranges:
        for begin, num_bytes in _frames(part.source, part.num_bytes):
            view = mapping.view(begin, num_bytes)
            # Sent while it is in the cache.
            checksum.update(view)
            unsent.append(view)
            num_unsent += num_bytes
            if num_unsent >= _SMALL_BYTES:
                session.stream.send(*unsent)
                unsent, num_unsent = [], 0
    session.stream.send(*unsent, checksum.digest())


def _frames(offset: int, num_bytes: int) -> Iterator[tuple[int, int]]:
    for begin in range(offset, offset + num_bytes, _FRAME_BYTES):
        yield begin, min(_FRAME_BYTES, offset + num_bytes - begin)


class _TcpChannel:
    def __init__(self, stream: Stream, target: Mapping) -> None:
        tune(stream)
        self._target = target

    def receive(self, session: Session, request: WriteRequest, write: Write) -> None:
        checksum = xxhash.xxh3_64()
        for part in request.ranges:
            for begin, num_bytes in _frames(part.target, part.num_bytes):
                if write.permit.is_revoked:
                    raise TransferError(f"a write of {session.stream.peer} was cut short: its token was revoked")
                view = self._target.view(begin, num_bytes)
                session.stream.receive(view)
                checksum.update(view)
        if session.stream.receive_bytes(_CHECKSUM_BYTES) != checksum.digest():
            raise RefusedError("the bytes that arrived are not those that were sent (checksum)")

    def refuse(self, session: Session, request: WriteRequest) -> None:
        if request.num_bytes > self._target.num_bytes:
            raise TransferError(f"{session.stream.peer} announces {request.num_bytes} bytes: more than there are")
        session.stream.discard(request.num_bytes + _CHECKSUM_BYTES)

    def cut(self, session: Session) -> None:
        session.stream.shut()

    def close(self) -> None:
        pass


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
