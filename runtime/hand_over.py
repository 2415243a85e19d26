"""Sends the KV of sequences to the instances that go on with them, chunk by chunk while the rest is being computed.

A sequence with a hand-over ends with its first token, and one that gets its hand-over later ends with the tokens it has
then. What a completed step computed of it is sent from there on by another thread; its slot stays until that thread has
nothing more to read. A receiver that is gone ends the sending and
not the request: the last output says how much has arrived, and whoever goes on computes the rest.
"""

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Items
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

from xllm_compile.runtime.outputs import HandOverStats, KVSent
from xllm_compile.runtime.transfer.transfer import ByteRange, Sender, TransferError, UnreachableError

logger = logging.getLogger(__name__)

_NUM_THREADS = 2
"""That send to one receiver."""
_MAX_RECEIVERS = 64
_REST_S = 30.0
"""How long nothing is sent to a receiver that did not answer: each write would wait for it once more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HandOver:
    """Where a request's KV goes: the answer of the receiver's reservation (runtime/reservations.py)."""

    transfers: Items[str]
    token: bytes
    num_cached_tokens: int
    """Tokens from the start that the receiver has."""
    page_offsets: Items[int]
    """Of its pages, by position; page_bytes each."""
    page_bytes: int
    num_tokens: int | None = None
    """Tokens from the start that it has room for; None for all there will be."""

    def __post_init__(self) -> None:
        if self.page_bytes < 1 or not self.page_offsets:
            raise ValueError(
                f"hand_over has {len(self.page_offsets)} pages of {self.page_bytes} bytes, which is no place;"
                " give it what Reserve answered"
            )

    @property
    def num_bytes(self) -> int:
        """Room from the start of the sequence."""
        return len(self.page_offsets) * self.page_bytes


class Push:
    """The KV of one sequence on its way. The engine's thread says how far it may go, a thread of the receiver sends."""

    def __init__(
        self,
        target: HandOver,
        receiver: "_Receiver | None",
        token_bytes: int,
        on_rest: Callable[[], None],
    ) -> None:
        """on_rest is called by a thread when it has nothing more to send. receiver: None sends nothing."""
        self.num_bytes = 0
        self._target = target
        self._receiver = receiver
        self._token_bytes = token_bytes
        self._on_rest = on_rest
        self._lock = Lock()
        # Guarded by _lock:
        self._num_sent = self._num_queued = target.num_cached_tokens
        self._begin_s = self._end_s = 0.0
        """Of the writes so far."""
        self._parts: list[tuple[int, list[ByteRange]]] = []
        """Tokens from the start that are there once the ranges are; in order."""
        self._is_busy = False
        self._error: TransferError | None = None

    @property
    def num_sent_tokens(self) -> int:
        """Tokens from the start whose KV the receiver has."""
        return self._num_sent

    def num_wanted_tokens(self, num_tokens: int) -> int:
        """Of so many from the start, those that the receiver has room for."""
        room = self._target.num_tokens
        return num_tokens if room is None else min(num_tokens, room)

    @property
    def sent(self) -> KVSent | None:
        """What was written when; None where nothing arrived."""
        if self.num_bytes == 0:
            return None
        return KVSent(begin_s=self._begin_s, end_s=self._end_s, num_bytes=self.num_bytes)

    @property
    def error(self) -> TransferError | None:
        return self._error

    @property
    def is_busy(self) -> bool:
        """Whether the sequence's pages may be read now."""
        return self._is_busy

    def advance(self, num_tokens: int, page_offsets: Items[int], page_bytes: int) -> None:
        """The KV of the first num_tokens is there, on this side's pages: send what was not. Returns at once."""
        num_tokens = self.num_wanted_tokens(num_tokens)
        with self._lock:
            if num_tokens <= self._num_queued or self._error is not None or self._receiver is None:
                return
            begin, end = self._num_queued * self._token_bytes, num_tokens * self._token_bytes
            target = self._target
            ranges = split_ranges(begin, end, page_offsets, page_bytes, target.page_offsets, target.page_bytes)
            self._parts.append((num_tokens, ranges))
            self._num_queued = num_tokens
            if self._is_busy:
                return
            self._is_busy = True
            receiver = self._receiver
        receiver.pool.submit(self._send)

    def pause(self) -> None:
        """Send nothing more; a write under way goes on. `advance` begins again with what has not arrived."""
        with self._lock:
            self._parts.clear()
            self._num_queued = self._num_sent

    def _send(self) -> None:
        assert self._receiver is not None
        while True:
            with self._lock:
                if not self._parts or self._error is not None:
                    self._is_busy = False
                    break
                parts, self._parts = self._parts, []
            ranges = [part for _, ranges in parts for part in ranges]
            self._begin_s = self._begin_s or time.monotonic()
            try:
                self._receiver.write(self._target.token, ranges)
            except (TransferError, ValueError) as err:
                with self._lock:
                    self._error = err if isinstance(err, TransferError) else TransferError(str(err))
            else:
                with self._lock:
                    self._num_sent = max(self._num_sent, parts[-1][0])
                    self._num_queued = max(self._num_queued, self._num_sent)
                    self.num_bytes += sum(part.num_bytes for part in ranges)
                    self._end_s = time.monotonic()
        self._on_rest()


class HandOvers:
    """The pushes of one instance. Belongs to the engine's thread."""

    def __init__(
        self, connect: Callable[[Items[str]], Sender], token_bytes: int, *, clock: Callable[[], float]
    ) -> None:
        """connect raises ValueError where none of the addresses can be reached."""
        self._connect = connect
        self._token_bytes = token_bytes
        self._clock = clock
        self._receivers: OrderedDict[tuple[str, ...], _Receiver] = OrderedDict()
        """By addresses, the one used last at the end."""
        self._num_complete = self._num_failed = self._num_prefixes = self._num_failed_prefixes = self._num_bytes = 0
        self.on_rest: Callable[[], None] = lambda: None
        """Called in another thread when a push has nothing more to send."""

    def start(self, request_id: str, target: HandOver) -> Push:
        """Where no address can be reached nothing is sent, which is not an error of the request."""
        receiver = None
        try:
            receiver = self._receiver(tuple(target.transfers))
        except ValueError as err:
            logger.warning("request %s: its KV stays here: %s", request_id, err)
        return Push(target, receiver, self._token_bytes, lambda: self.on_rest())

    def count(self, request_id: str, push: Push, num_tokens: int) -> None:
        """A sequence of num_tokens was handed over."""
        self._num_bytes += push.num_bytes
        num_tokens = push.num_wanted_tokens(num_tokens)
        if push.num_sent_tokens == num_tokens:
            self._num_complete += 1
            return
        self._num_failed += 1
        if push.error is not None:
            arrived = push.num_sent_tokens
            logger.warning("request %s: %d of %d tokens of KV arrived: %s", request_id, arrived, num_tokens, push.error)

    def count_prefix(self, push: Push) -> None:
        """A prefix was sent to whom lacked it, or the way there broke."""
        self._num_bytes += push.num_bytes
        self._num_prefixes += push.num_bytes > 0
        if push.error is not None:
            self._num_failed_prefixes += 1
            logger.warning("a prefix of KV did not arrive: %s", push.error)

    def stats(self, num_open: int) -> HandOverStats:
        return HandOverStats(
            num_open=num_open,
            num_complete=self._num_complete,
            num_failed=self._num_failed,
            num_prefixes=self._num_prefixes,
            num_failed_prefixes=self._num_failed_prefixes,
            num_bytes=self._num_bytes,
        )

    def close(self) -> None:
        """Ends the writes under way."""
        for receiver in self._receivers.values():
            receiver.sender.close()
            receiver.pool.shutdown()

    def _receiver(self, addresses: tuple[str, ...]) -> "_Receiver":
        if addresses not in self._receivers:
            self._receivers[addresses] = _Receiver(self._connect(addresses), self._clock)
            if len(self._receivers) > _MAX_RECEIVERS:
                # A receiver that was restarted has other addresses than before.
                self._receivers.popitem(last=False)[1].leave()
        self._receivers.move_to_end(addresses)
        return self._receivers[addresses]


class _Receiver:
    """One that KV is sent to, by threads of its own: others do not wait for one that stands still."""

    def __init__(self, sender: Sender, clock: Callable[[], float]) -> None:
        self.sender = sender
        self.pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="xllm-push")
        self._clock = clock
        self._rests_until_s = -math.inf

    def write(self, token: bytes, ranges: Items[ByteRange]) -> None:
        """See Sender. Raises TransferError at once while it rests."""
        rest_s = self._rests_until_s - self._clock()
        if rest_s > 0:
            raise UnreachableError(f"the receiver did not answer lately; it is tried again in {rest_s:.0f} s")
        try:
            self.sender.write(token, ranges)
        except UnreachableError:
            self._rests_until_s = self._clock() + _REST_S
            raise

    def leave(self) -> None:
        """Closing waits for its writes: not here. The threads end with the last push that has them."""
        self.pool.submit(self.sender.close)


def split_ranges(
    begin: int,
    end: int,
    source_offsets: Items[int],
    source_page_bytes: int,
    target_offsets: Items[int],
    target_page_bytes: int,
) -> list[ByteRange]:
    """Bytes [begin, end) of a sequence, from its pages on one side to those on the other, whose size may differ."""
    ranges: list[ByteRange] = []
    while begin < end:
        source_page, source_at = divmod(begin, source_page_bytes)
        target_page, target_at = divmod(begin, target_page_bytes)
        count = min(end - begin, source_page_bytes - source_at, target_page_bytes - target_at)
        source, target = source_offsets[source_page] + source_at, target_offsets[target_page] + target_at
        last = ranges[-1] if ranges else None
        if last is not None and (last.source + last.num_bytes, last.target + last.num_bytes) == (source, target):
            ranges[-1] = ByteRange(source=last.source, target=last.target, num_bytes=last.num_bytes + count)
        else:
            ranges.append(ByteRange(source=source, target=target, num_bytes=count))
        begin += count
    return ranges
