"""The receiving end of one scheme: a listening socket, a thread for it and one for each connection."""

import logging
import socket
from collections.abc import Callable
from threading import Event, Lock, Thread
from typing import Protocol

from xllm_compile.runtime.transfer.permits import Permits, RefusedError, Write
from xllm_compile.runtime.transfer.session import Session, WriteRequest, greet_sender
from xllm_compile.runtime.transfer.stream import Stream
from xllm_compile.runtime.transfer.transfer import TransferConfig, TransferError

logger = logging.getLogger(__name__)

_MAX_CONNECTIONS = 256
_ACCEPT_PAUSE_S = 0.1


class Channel(Protocol):
    """How the bytes of one connection's writes come."""

    def receive(self, session: Session, request: WriteRequest, write: Write) -> None:
        """Bring the bytes to their places. RefusedError: they are not, TransferError: nor can the connection go on."""
        ...

    def refuse(self, session: Session, request: WriteRequest) -> None:
        """Leave the connection as if the write had not been asked for."""
        ...

    def cut(self, session: Session) -> None:
        """Has the write under way end soon; called from other threads."""
        ...

    def close(self) -> None: ...


class Server:
    """Takes writes that the permits allow."""

    def __init__(
        self,
        listening: socket.socket,
        address: str,
        permits: Permits,
        config: TransferConfig,
        open_channel: Callable[[Session], Channel],
        *,
        details: bytes = b"",
        release: Callable[[], None] = lambda: None,
    ) -> None:
        """Owns the socket.

        open_channel raises TransferError for a sender that does not keep to the scheme. details are for senders,
        release is called when nothing is received any more.
        """
        self.address = address
        self._listening = listening
        self._permits = permits
        self._config = config
        self._open_channel = open_channel
        self._details = details
        self._release = release
        self._lock = Lock()
        self._closing = Event()
        self._connections: dict[Stream, Thread] = {}
        self._acceptor = Thread(target=self._accept, name=f"kv-{address.partition(':')[0]}", daemon=True)
        self._acceptor.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, peer = self._listening.accept()
            except OSError as err:
                if self._closing.is_set():
                    return
                # Of the connection, or of the process's descriptors: the next one may do.
                logger.warning("a connection for KV was not accepted: %s", err)
                self._closing.wait(_ACCEPT_PAUSE_S)
                continue
            name = f"sender {peer[0]}:{peer[1]}" if isinstance(peer, tuple) else "sender on this machine"
            stream = Stream(connection, name, self._config.timeout_s)
            thread = Thread(target=self._serve, args=(stream,), name="kv-receive", daemon=True)
            with self._lock:
                is_taken = not self._closing.is_set() and len(self._connections) < _MAX_CONNECTIONS
                if is_taken:
                    self._connections[stream] = thread
            if is_taken:
                thread.start()
            else:
                logger.warning("%s is turned away: %d connections are open", name, _MAX_CONNECTIONS)
                stream.close()

    def _serve(self, stream: Stream) -> None:
        try:
            session = greet_sender(stream, self._config.secret, self._details)
            channel = self._open_channel(session)
            try:
                while stream.wait():
                    self._take_write(session, channel)
            finally:
                channel.close()
        except (TransferError, OSError) as err:
            if not self._closing.is_set():
                logger.warning("a connection for KV ends: %s", err)
        finally:
            with self._lock:
                del self._connections[stream]
            stream.close()

    def _take_write(self, session: Session, channel: Channel) -> None:
        request = session.receive_request()
        try:
            write = self._admit(session, request, lambda: channel.cut(session))
        except RefusedError as err:
            channel.refuse(session, request)
            session.reply(str(err))
            return
        failure = None
        try:
            channel.receive(session, request, write)
        except RefusedError as err:
            failure = str(err)
        finally:
            self._permits.end(write)
        # Not before: with the answer the sender's side may have the pages used.
        session.reply(failure)

    def _admit(self, session: Session, request: WriteRequest, cut: Callable[[], None]) -> Write:
        permit = self._permits.find(request.token_id)
        if not session.is_proved(request, permit.token if permit else b"") or permit is None:
            raise RefusedError("it does not know the token: revoked, or given by an earlier start of the instance")
        return self._permits.begin(permit, [(part.target, part.num_bytes) for part in request.ranges], cut)

    def close(self) -> None:
        """Returns when no thread of it is left."""
        self._closing.set()
        # Wakes the thread that accepts; closing alone does not.
        self._listening.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listening.close()
        with self._lock:
            connections = dict(self._connections)
        for stream in connections:
            stream.shut()
        for thread in connections.values():
            thread.join()
        self._release()
