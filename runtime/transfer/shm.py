"""Between processes of one user on one machine: the receiver maps the sender's memory and copies by itself.

The sender hands over its region's file, opened for reading only, with each connection, and then says what to copy
where. So nobody ever writes to another's pages: what a token permits is enforced, a revoked write ends where it is,
and a sender that dies in the middle leaves no writer behind. The file is sealed against shrinking, so the copy cannot
run into its end.
"""

import functools
import hashlib
import os
import secrets
import socket
import struct
from collections.abc import Callable, Sequence
from fcntl import F_GET_SEALS, F_SEAL_SHRINK, fcntl
from pathlib import Path

from xllm_compile.runtime.transfer.client import Client
from xllm_compile.runtime.transfer.mapping import Mapping
from xllm_compile.runtime.transfer.permits import Permits, RefusedError, Write
from xllm_compile.runtime.transfer.server import Server
from xllm_compile.runtime.transfer.session import Session, WriteRequest, greet_receiver
from xllm_compile.runtime.transfer.stream import Stream
from xllm_compile.runtime.transfer.transfer import ByteRange, Region, Sender, TransferConfig, TransferError

CopyBytes = Callable[[int, int, int], object]
"""(target address, source address, num_bytes), with Python's lock released."""

# Between two looks at whether the token is revoked.
_PIECE_BYTES = 8 << 20
_BACKLOG = 64


@functools.cache
def machine_id() -> str:
    """Equal in processes that reach each other by shared memory: same running system, network namespace and user."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return hashlib.blake2b(
        f"{boot} {os.stat('/proc/self/ns/net').st_ino} {os.getuid()}".encode(), digest_size=8
    ).hexdigest()


def open_shm_receiver(mapping: Mapping, permits: Permits, config: TransferConfig, copy: CopyBytes) -> Server:
    """Raises OSError."""
    name = secrets.token_hex(16)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(_socket_name(name))
    listening.listen(_BACKLOG)

    def open_channel(session: Session) -> _ShmChannel:
        return _ShmChannel(session.stream, mapping, copy)

    return Server(listening, f"shm:{machine_id()}/{name}", permits, config, open_channel)


def connect_shm(address: str, region: Region, config: TransferConfig) -> Sender:
    """Raises ValueError when the address is of another machine or user."""
    machine, _, name = address.removeprefix("shm:").partition("/")
    if machine != machine_id():
        raise ValueError(f"{address} is on another machine, or of another user")

    def open_session() -> Session:
        connection = socket.socket(socket.AF_UNIX)
        stream = Stream(connection, address, config.timeout_s)
        try:
            try:
                connection.connect(_socket_name(name))
            except OSError as err:
                raise TransferError(f"{address} cannot be reached: {err.strerror}; has it ended?") from None
            _check_user(stream)
            session = greet_receiver(stream, config.secret)
            _send_region(stream, region)
        except BaseException:
            stream.close()
            raise
        return session

    def send(session: Session, request: bytes, ranges: Sequence[ByteRange]) -> None:
        session.stream.send(request)

    return Client(address, region, open_session, send, close=lambda: None)


class _ShmChannel:
    def __init__(self, stream: Stream, target: Mapping, copy: CopyBytes) -> None:
        """Raises TransferError."""
        _check_user(stream)
        self._target = target
        self._copy = copy
        self._source = _receive_region(stream)

    def receive(self, session: Session, request: WriteRequest, write: Write) -> None:
        for part in request.ranges:
            if part.source + part.num_bytes > self._source.num_bytes:
                raise RefusedError(f"{part.num_bytes} bytes at {part.source} are beyond the sender's region")
        target, source = self._target.address, self._source.address
        for part in request.ranges:
            for done in range(0, part.num_bytes, _PIECE_BYTES):
                write.check()
                num_bytes = min(_PIECE_BYTES, part.num_bytes - done)
                self._copy(target + part.target + done, source + part.source + done, num_bytes)

    def refuse(self, session: Session, request: WriteRequest) -> None:
        pass

    def cut(self, session: Session) -> None:
        """It looks by itself."""

    def close(self) -> None:
        self._source.close()


def _socket_name(name: str) -> str:
    # In no folder: gone with the process.
    return f"\0xllm-kv-{name}"


def _check_user(stream: Stream) -> None:
    """Anybody on the machine may connect, or listen on the name of an instance that ended."""
    _, user, _ = struct.unpack("iII", stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if user != os.getuid():
        raise TransferError(f"{stream.peer} is of user {user}, this instance of {os.getuid()}: use tcp between them")


def _send_region(stream: Stream, region: Region) -> None:
    # Opened anew for reading: the receiver can map it so, and no more.
    file = os.open(f"/proc/self/fd/{region.file}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        socket.send_fds(stream.socket, [b"f"], [file])
    except OSError as err:
        raise TransferError(f"{stream.peer} is gone: {err.strerror}") from None
    finally:
        os.close(file)


def _receive_region(stream: Stream) -> Mapping:
    try:
        _, files, _, _ = socket.recv_fds(stream.socket, 1, 1, socket.MSG_CMSG_CLOEXEC)
    except OSError as err:
        raise TransferError(f"{stream.peer} does not send its memory: {err.strerror}") from None
    if not files:
        raise TransferError(f"{stream.peer} does not send its memory")
    file = files[0]
    try:
        if not fcntl(file, F_GET_SEALS) & F_SEAL_SHRINK:
            raise TransferError(f"{stream.peer} sends memory that it could take away during a copy")
        return Mapping(Region(file=file, num_bytes=os.fstat(file).st_size), is_writable=False)
    except OSError as err:
        raise TransferError(f"the memory of {stream.peer} cannot be mapped: {err.strerror}") from None
    finally:
        os.close(file)
