"""The tier below host memory and disk: a store of KV blocks on the network that the instances of a service share.

Nobody here knows what is in it, so it is asked. The store's own client waits as long as it likes, and much longer where
the store is gone: one thread makes all of its calls, and whoever wants blocks waits for that thread for a bounded time
and goes without after it. A store that fails or is late is left alone for a while, which is said once.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from xllm_compile.runtime.memory.block_seal import DamagedBlockError, seal, unseal

logger = logging.getLogger(__name__)

TIMEOUT_S = 2.0
RETRY_S = 30.0
# Blocks on their way there. Beyond it the store is too slow, and blocks are dropped rather than collected in memory.
_MAX_PENDING_WRITES = 64


class StoreError(RuntimeError):
    """The store does not answer, or refuses. Says which store, and what to look at."""


class StoreClient(Protocol):
    """A connection. Belongs to the tier's thread; calls may take any time, and raise StoreError."""

    def num_present(self, keys: Sequence[str]) -> int:
        """How many of the keys, from the first one on, are there."""
        ...

    def get(self, key: str) -> bytes | None:
        """None where it is not there any more."""
        ...

    def put(self, key: str, value: bytes) -> bool:
        """False where there is no room. What is there already stays."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadBlocks:
    """What came of a prompt's blocks: those from the first one on that are there and whole."""

    blocks: Sequence[tuple[bytes, bytes]] = ()
    """Digest and content."""
    is_damaged: bool = False
    """The one behind them is torn or altered."""


class RemoteTier:
    """Thread-safe."""

    def __init__(
        self,
        connect: Callable[[], StoreClient],
        *,
        layout: str,
        timeout_s: float = TIMEOUT_S,
        retry_s: float = RETRY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """connect raises StoreError; it is called by the tier's thread, again and again. layout is a DiskTier's."""
        self._connect = connect
        self._prefix = f"xllm-kv/{layout}/"
        self._timeout_s, self._retry_s, self._clock = timeout_s, retry_s, clock
        self._client: StoreClient | None = None
        self._wake = threading.Condition()
        # Guarded by _wake:
        self._jobs: deque[Callable[[], None]] = deque()
        self._num_writing = 0
        self._is_closed = False
        self._busy_since_s: float | None = None
        """When the call under way began."""
        self._down_until_s = 0.0
        self._is_said = False
        """That it does not answer; until it does again."""
        # It may hang in the client when the process ends.
        self._thread = threading.Thread(target=self._run, name="xllm-kv-store", daemon=True)
        self._thread.start()

    @property
    def is_up(self) -> bool:
        """Whether it is worth to ask."""
        now, busy_s = self._clock(), self._busy_since_s
        if self._client is None or self._is_closed or now < self._down_until_s:
            return False
        return busy_s is None or now - busy_s < self._timeout_s

    def write(self, digest: bytes, data: bytes, on_kept: Callable[[bool], None]) -> bool:
        """Keep the block; returns at once. False where it is not tried; else on_kept hears, in the tier's thread."""
        with self._wake:
            if not self.is_up or self._num_writing >= _MAX_PENDING_WRITES:
                return False
            self._num_writing += 1
        self._submit(partial(self._write_now, digest, data, on_kept))
        return True

    def read(self, digests: Sequence[bytes], max_bytes: int) -> ReadBlocks:
        """The blocks from the first one on that are there, of about max_bytes together. Waits timeout_s at most."""
        if not self.is_up or not digests:
            return ReadBlocks()
        found: Future[ReadBlocks] = Future()
        until_s = self._clock() + self._timeout_s
        self._submit(partial(self._read_now, digests, max_bytes, until_s, found), is_urgent=True)
        try:
            return found.result(self._timeout_s)
        except TimeoutError:
            if not found.cancel():
                self._note_down(f"no answer within {self._timeout_s:g} s")
            return ReadBlocks()

    def flush(self) -> None:
        """Wait until what was started is done; for tests."""
        done: Future[None] = Future()
        self._submit(lambda: done.set_result(None))
        done.result()

    def close(self) -> None:
        """What is on its way is given up."""
        with self._wake:
            self._is_closed = True
            self._jobs.clear()
            self._wake.notify()
        self._thread.join(self._timeout_s)

    def _submit(self, job: Callable[[], None], *, is_urgent: bool = False) -> None:
        with self._wake:
            if self._is_closed:
                return
            if is_urgent:
                self._jobs.appendleft(job)
            else:
                self._jobs.append(job)
            self._wake.notify()

    def _run(self) -> None:
        while not self._is_closed:
            if self._client is None:
                self._try_to_connect()
            elif (job := self._next_job()) is not None:
                job()
        # Of one that is gone it could take long; the process ends without it.
        if self._client is not None and not self._is_said:
            self._client.close()

    def _try_to_connect(self) -> None:
        try:
            self._client = self._connect()
            self._note_up()
        except StoreError as err:
            self._note_down(str(err))
            with self._wake:
                self._wake.wait_for(lambda: self._is_closed, self._retry_s)

    def _next_job(self) -> Callable[[], None] | None:
        """None when it is time to stop."""
        with self._wake:
            self._busy_since_s = None
            self._wake.wait_for(lambda: self._jobs or self._is_closed)
            if self._is_closed:
                return None
            self._busy_since_s = self._clock()
            return self._jobs.popleft()

    def _read_now(self, digests: Sequence[bytes], max_bytes: int, until_s: float, found: "Future[ReadBlocks]") -> None:
        if not found.set_running_or_notify_cancel():
            return
        blocks: list[tuple[bytes, bytes]] = []
        is_damaged = False
        assert self._client is not None
        try:
            keys = [self._prefix + digest.hex() for digest in digests]
            num_bytes = 0
            for digest, key in zip(digests[: self._client.num_present(keys)], keys, strict=False):
                # What would be late is computed.
                content = self._client.get(key) if num_bytes < max_bytes and self._clock() < until_s else None
                if content is None:
                    break
                blocks.append((digest, unseal(content)))
                num_bytes += len(content)
            self._note_up()
        except DamagedBlockError:
            is_damaged = True
        except StoreError as err:
            self._note_down(str(err))
        found.set_result(ReadBlocks(blocks=blocks, is_damaged=is_damaged))

    def _write_now(self, digest: bytes, data: bytes, on_kept: Callable[[bool], None]) -> None:
        assert self._client is not None
        is_kept = False
        try:
            if self._clock() >= self._down_until_s:
                is_kept = self._client.put(self._prefix + digest.hex(), seal(data))
                self._note_up()
        except StoreError as err:
            self._note_down(str(err))
        with self._wake:
            self._num_writing -= 1
        on_kept(is_kept)

    def _note_down(self, reason: str) -> None:
        with self._wake:
            self._down_until_s = self._clock() + self._retry_s
            is_new, self._is_said = not self._is_said, True
        if is_new:
            logger.warning("the KV store is left out until it answers: %s", reason)

    def _note_up(self) -> None:
        if self._is_said:
            self._is_said = False
            logger.warning("the KV store answers again")
