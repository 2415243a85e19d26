"""KV pages held for sequences whose beginning other instances compute: a slot each, until a request claims it.

The sender's token permits writes to exactly the bytes behind what is cached here. Before the slot serves anybody, the
claiming request or, after a release or a timeout, another sequence, the token is revoked, by another thread: that may
have to wait for a write that is under way. A slot whose writer cannot be stopped is never used again.
"""

import logging
import math
import secrets
from collections.abc import Callable
from collections.abc import Sequence as Items
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from xllm_compile.runtime.kv_cache import KVCache
from xllm_compile.runtime.outputs import ReservationStats
from xllm_compile.runtime.policies.chunk import awaited_step_s
from xllm_compile.runtime.policies.output_length import OutputLength
from xllm_compile.runtime.transfer.transfer import Receiver, TransferError

logger = logging.getLogger(__name__)

MAX_TIMEOUT_S = 600.0
_TOKEN_BYTES = 32
_NUM_REVOKERS = 4


class ReservationError(ValueError):
    """A request for a reservation, or with one, that does not go with those there are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReservationRequest:
    """Who asks for a slot, and for what."""

    reservation_id: str
    """The same again renews it."""
    token_ids: tuple[int, ...]
    """That its sequence begins with."""
    timeout_s: float
    """Until a request has come for it."""
    holder: str = ""
    """Whose `release_all` gives it up."""
    tpot_slo_s: float = math.inf
    """Target of its request, which steps keep as soon as it may come."""
    max_output_tokens: float = math.inf
    """Most that its request may still have; infinity where nobody says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reservation:
    """What the sender of the KV has to know. Offsets and bytes are of the receiver's region (runtime/transfer)."""

    reservation_id: str
    transfers: tuple[str, ...]
    """Where to send, the fastest way first."""
    token: bytes
    num_cached_tokens: int
    """Tokens from the start that are there; their bytes must not be sent, and are refused."""
    page_offsets: tuple[int, ...]
    """Of the pages that hold the sequence, by position."""
    page_bytes: int
    num_tokens: int
    """From the start, that it has room for."""


@dataclass(eq=False, kw_only=True, slots=True)
class _Held:
    """A slot that waits for its request, or for the end of its writer."""

    slot: int
    wanted: ReservationRequest
    answer: Reservation
    deadline_s: float
    is_claimed: bool = False
    revoked: "Future[None] | None" = None
    """Set once nothing more is to be written; done when nothing is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClaimedSlot:
    """A slot that is the claiming sequence's own from here on."""

    slot: int
    num_tokens: int
    """What its pages have room for: the length of the reservation."""
    num_cached_tokens: int


class Reservations:
    """Belongs to the engine's thread. The device must be at rest while `open` takes pages."""

    def __init__(self, kv_cache: KVCache, receiver: Receiver, *, clock: Callable[[], float]) -> None:
        self._kv_cache = kv_cache
        self._receiver = receiver
        self._clock = clock
        self._held: dict[str, _Held] = {}
        self._leaving: list[_Held] = []
        """Given up; their tokens are being revoked."""
        self._revokers = ThreadPoolExecutor(_NUM_REVOKERS, thread_name_prefix="xllm-revoke")
        self._num_claimed = self._num_released = self._num_expired = 0
        self.on_revoked: Callable[[], None] = lambda: None
        """Called in another thread when `tend` has something to do."""

    @property
    def num_held(self) -> int:
        """Slots that no sequence of this instance has and nobody else may take."""
        return len(self._held) + len(self._leaving)

    def step_s(self, length: OutputLength) -> float:
        """Longest step with which sequences that may come at any moment keep their TPOT targets; infinity without any.

        length: of their answers.
        """
        wanted = (held.wanted for held in self._held.values())
        return min(
            (awaited_step_s(one.tpot_slo_s, length.expected(one.max_output_tokens)) for one in wanted), default=math.inf
        )

    def num_growth_blocks(self, horizon: int) -> int:
        """Pages that reserved sequences take beyond those they have while each generates horizon tokens."""
        size, most = self._kv_cache.page_tokens, self._kv_cache.config.max_model_len
        lengths = (len(held.wanted.token_ids) for held in self._held.values())
        return sum(-(-min(length + horizon, most) // size) - -(-length // size) for length in lengths)

    def stats(self) -> ReservationStats:
        return ReservationStats(
            num_open=self.num_held,
            num_claimed=self._num_claimed,
            num_released=self._num_released,
            num_expired=self._num_expired,
        )

    def renewed(self, wanted: ReservationRequest) -> Reservation | None:
        """The answer that was given before, with its time running anew; None where nothing of the id is held.

        Raises ReservationError when the id is that of other tokens, or was claimed.
        """
        held = self._held.get(wanted.reservation_id)
        if held is None:
            return None
        if held.is_claimed or held.wanted.token_ids != wanted.token_ids:
            what = "is claimed by a request" if held.is_claimed else f"holds {len(held.wanted.token_ids)} other tokens"
            raise ReservationError(f"reservation_id={wanted.reservation_id!r} {what}; choose another")
        held.deadline_s = self._clock() + held.wanted.timeout_s
        return held.answer

    def open(self, wanted: ReservationRequest) -> Reservation:
        """Take a slot with pages for the tokens, of which there must be enough. What is cached of them is shared."""
        kv_cache, token_ids = self._kv_cache, wanted.token_ids
        chain = kv_cache.new_chain()
        chain.update(token_ids)
        # All of them may be cached: what is computed next is the token behind them.
        num_cached = kv_cache.find(chain, len(token_ids) + 1)
        slot = kv_cache.allocate(chain, len(token_ids) + 1, num_cached)
        num_cached = kv_cache.length(slot)
        # Senders write to the pages, whether they are mapped here or not: `take` waits for that.
        has_room = kv_cache.extend(slot, len(token_ids) - num_cached, is_ahead=True)
        assert has_room, "the engine counts no fewer pages than the cache"
        answer = Reservation(
            reservation_id=wanted.reservation_id,
            transfers=self._receiver.addresses,
            token=secrets.token_bytes(_TOKEN_BYTES),
            num_cached_tokens=num_cached,
            page_offsets=tuple(kv_cache.page_offsets(slot)),
            page_bytes=kv_cache.config.page_size,
            num_tokens=len(token_ids),
        )
        self._receiver.permit(answer.token, list(_open_ranges(answer, kv_cache.config.bytes_per_token, len(token_ids))))
        deadline_s = self._clock() + wanted.timeout_s
        self._held[wanted.reservation_id] = _Held(slot=slot, wanted=wanted, answer=answer, deadline_s=deadline_s)
        return answer

    def claim(self, reservation_id: str, token_ids: Items[int]) -> "Future[None] | None":
        """Keep the slot for a request with these tokens: done when its KV changes no more, and `take` may be called.

        None where there is nothing to claim: it is unknown, has timed out, or is another request's. Raises
        ReservationError when it is of other tokens. A claim that nobody takes times out as well.
        """
        held = self._held.get(reservation_id)
        if held is None or held.is_claimed:
            return None
        if held.wanted.token_ids != tuple(token_ids[: len(held.wanted.token_ids)]):
            raise ReservationError(f"reservation_id={reservation_id!r} holds KV of other tokens than the request's")
        held.is_claimed = True
        held.deadline_s = self._clock() + held.wanted.timeout_s
        return self._revoke(held)

    def take(self, reservation_id: str) -> ClaimedSlot | None:
        """Give the claimed slot to the sequence. None where it was given up meanwhile, or its writer goes on."""
        held = self._held.get(reservation_id)
        if held is None or not held.is_claimed or not _is_quiet(held):
            return None
        del self._held[reservation_id]
        self._kv_cache.settle(held.slot)
        self._num_claimed += 1
        cached = held.answer.num_cached_tokens
        return ClaimedSlot(slot=held.slot, num_tokens=len(held.wanted.token_ids), num_cached_tokens=cached)

    def release(self, reservation_id: str) -> "Future[None] | None":
        """Give it up: done when nobody writes to its pages any more. None where there is none of that id."""
        held = self._held.get(reservation_id)
        if held is None:
            return None
        self._num_released += 1
        return self._give_up(reservation_id, held)

    def release_all(self, holder: str) -> None:
        """Give up what is the holder's and no request has claimed: it is gone, and comes for none of it."""
        for reservation_id, held in list(self._held.items()):
            if held.wanted.holder == holder and not held.is_claimed:
                logger.info("reservation %s: who took it is gone", reservation_id)
                self.release(reservation_id)

    def next_due_s(self) -> float | None:
        """Seconds until the next one times out; None where none is held."""
        if not self._held:
            return None
        return max(0.0, min(held.deadline_s for held in self._held.values()) - self._clock())

    def tend(self) -> None:
        """Give up what has timed out, and free the slots of what was given up once nobody writes to them."""
        if not self._held and not self._leaving:
            return
        now = self._clock()
        for reservation_id, held in list(self._held.items()):
            if held.deadline_s <= now:
                logger.warning("reservation %s: nobody came for it within %g s", reservation_id, held.wanted.timeout_s)
                self._num_expired += 1
                self._give_up(reservation_id, held)
        for held in [held for held in self._leaving if _is_quiet(held)]:
            self._leaving.remove(held)
            self._kv_cache.free(held.slot)

    def close(self) -> None:
        """Ends the writes under way. Nothing is reserved after."""
        self._receiver.close()
        self._revokers.shutdown()

    def _give_up(self, reservation_id: str, held: _Held) -> "Future[None]":
        del self._held[reservation_id]
        self._leaving.append(held)
        return self._revoke(held)

    def _revoke(self, held: _Held) -> "Future[None]":
        if held.revoked is None:
            held.revoked = self._revokers.submit(self._revoke_now, held.answer)
            held.revoked.add_done_callback(lambda _: self.on_revoked())
        return held.revoked

    def _revoke_now(self, answer: Reservation) -> None:
        try:
            self._receiver.revoke(answer.token)
        except TransferError as err:
            logger.error("reservation %s: its pages are lost: %s", answer.reservation_id, err)
            raise


def _is_quiet(held: _Held) -> bool:
    return held.revoked is not None and held.revoked.done() and held.revoked.exception() is None


def _open_ranges(answer: Reservation, token_bytes: int, num_tokens: int) -> Items[tuple[int, int]]:
    """(offset, bytes) of the region that hold the tokens behind the cached ones."""
    begin, end = answer.num_cached_tokens * token_bytes, num_tokens * token_bytes
    ranges = []
    for position, offset in enumerate(answer.page_offsets):
        first = max(begin - position * answer.page_bytes, 0)
        last = min(end - position * answer.page_bytes, answer.page_bytes)
        if first < last:
            ranges.append((offset + first, last - first))
    return ranges
