"""A connected socket that sends and receives whole messages, or says what is wrong with the peer."""

import contextlib
import socket
import struct
from collections.abc import Callable

from xllm_compile.runtime.transfer.transfer import TransferError, UnreachableError

# sendmsg takes as many parts as the system's IOV_MAX.
_MAX_PARTS = 1024
_DISCARD_BYTES = 1 << 20


class ConnectionLostError(TransferError):
    """The peer closed the connection, or the network did."""


class Stream:
    """Blocking. Every call raises UnreachableError after timeout_s without progress, ConnectionLostError at its end."""

    def __init__(self, connection: socket.socket, peer: str, timeout_s: float) -> None:
        self.socket = connection
        self.peer = peer
        self.timeout_s = timeout_s
        # The kernel's own timeouts: Python's would ask for readiness before every call, and give up MSG_WAITALL.
        timeout = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)

    def wait(self) -> bool:
        """Until there is something to receive, however long it takes. False: the peer has closed the connection."""
        while True:
            try:
                return bool(self.socket.recv(1, socket.MSG_PEEK))
            except BlockingIOError:
                continue
            except OSError:
                return False

    def receive(self, view: memoryview) -> None:
        """Fill the bytes of the view."""
        done = 0
        while done < len(view):
            done += self._moved(lambda: self.socket.recv_into(view[done:], 0, socket.MSG_WAITALL))  # noqa: B023

    def receive_bytes(self, num_bytes: int) -> bytes:
        data = bytearray(num_bytes)
        self.receive(memoryview(data))
        return bytes(data)

    def discard(self, num_bytes: int) -> None:
        """Receive and forget."""
        scratch = memoryview(bytearray(min(num_bytes, _DISCARD_BYTES)))
        while num_bytes:
            part = scratch[: min(num_bytes, _DISCARD_BYTES)]
            self.receive(part)
            num_bytes -= len(part)

    def send(self, *parts: bytes | memoryview) -> None:
        left = [memoryview(part) for part in parts if len(part)]
        while left:
            sent = self._moved(lambda: self.socket.sendmsg(left[:_MAX_PARTS]))
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if sent:
                left[0] = left[0][sent:]

    def _moved(self, call: Callable[[], int]) -> int:
        try:
            num_bytes = call()
        except BlockingIOError:
            raise UnreachableError(f"{self.peer} made no progress for {self.timeout_s:g} s") from None
        except TimeoutError:
            raise UnreachableError(f"{self.peer} cannot be reached: its host takes no bytes") from None
        except OSError as err:
            raise ConnectionLostError(f"{self.peer} is gone: {err.strerror or err}") from None
        if num_bytes == 0:
            raise ConnectionLostError(f"{self.peer} closed the connection")
        return num_bytes

    def shut(self) -> None:
        """Ends whatever call is under way, from any thread."""
        # It may have ended already.
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.socket.close()
