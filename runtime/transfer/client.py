"""The sending end of one scheme: a few connections to one receiver, made when they are needed."""

from collections.abc import Callable, Sequence
from threading import Condition
from typing import Protocol

from xllm_compile.runtime.transfer.session import Session
from xllm_compile.runtime.transfer.stream import ConnectionLostError
from xllm_compile.runtime.transfer.transfer import ByteRange, Region, TransferError

_MAX_IDLE = 4


class SendBytes(Protocol):
    """Sends the request, and the bytes where the scheme has them sent on the connection."""

    def __call__(self, session: Session, request: bytes, ranges: Sequence[ByteRange]) -> None: ...


class Client:
    """See Sender. Each write under way has a connection of its own."""

    def __init__(
        self,
        address: str,
        region: Region,
        open_session: Callable[[], Session],
        send: SendBytes,
        close: Callable[[], None],
    ) -> None:
        """open_session connects, raising TransferError. close lets go of what both use."""
        self.address = address
        self._num_bytes = region.num_bytes
        self._open_session = open_session
        self._send = send
        self._close = close
        self._changed = Condition()
        self._is_closed = False
        self._num_writes = 0
        self._idle: list[Session] = []
        self._busy: set[Session] = set()

    def write(self, token: bytes, ranges: Sequence[ByteRange]) -> None:
        for part in ranges:
            if part.num_bytes < 0 or part.source < 0 or part.source + part.num_bytes > self._num_bytes:
                raise ValueError(
                    f"{part.num_bytes} bytes at {part.source} are not in this side's region of {self._num_bytes}"
                )
        # A receiver has no place for nothing.
        wanted = [part for part in ranges if part.num_bytes]
        if not wanted:
            return
        with self._changed:
            self._check_open()
            self._num_writes += 1
        try:
            self._write_again_if_stale(token, wanted)
        finally:
            with self._changed:
                self._num_writes -= 1
                self._changed.notify_all()

    def _write_again_if_stale(self, token: bytes, ranges: Sequence[ByteRange]) -> None:
        session = self._idle_session()
        if session is not None:
            try:
                return self._write(session, token, ranges)
            except ConnectionLostError:
                # The receiver may have been restarted since, or have closed what was idle. Writing twice does no harm.
                self._drop_idle()
        self._write(self._new_session(), token, ranges)

    def _write(self, session: Session, token: bytes, ranges: Sequence[ByteRange]) -> None:
        is_usable = False
        try:
            self._send(session, session.request(token, ranges), ranges)
            refusal = session.receive_reply()
            is_usable = True
        finally:
            self._give_back(session, is_usable=is_usable)
        if refusal is not None:
            raise TransferError(f"{self.address} refuses a write of KV: {refusal}")

    def _idle_session(self) -> Session | None:
        with self._changed:
            if not self._idle:
                return None
            session = self._idle.pop()
            self._busy.add(session)
            return session

    def _new_session(self) -> Session:
        session = self._open_session()
        with self._changed:
            self._busy.add(session)
            if self._is_closed:
                session.stream.shut()
        return session

    def _give_back(self, session: Session, *, is_usable: bool) -> None:
        with self._changed:
            self._busy.remove(session)
            is_kept = is_usable and not self._is_closed and len(self._idle) < _MAX_IDLE
            if is_kept:
                self._idle.append(session)
        if not is_kept:
            session.stream.close()

    def _drop_idle(self) -> None:
        with self._changed:
            idle, self._idle = self._idle, []
        for session in idle:
            session.stream.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise TransferError(f"the connection to {self.address} was closed by this side")

    def close(self) -> None:
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            for session in self._busy:
                session.stream.shut()
            self._changed.wait_for(lambda: self._num_writes == 0)
        self._drop_idle()
        self._close()
