"""KV that goes from one instance to another, as the engine sees it: slots that others write to, or read.

``reservations`` are the receiving side, ``hand_over`` the sending one: of sequences while they are computed, and of
cached prefixes that another instance lacks. Belongs to the engine's thread.
"""

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from concurrent.futures import Future
from dataclasses import dataclass

from xllm_compile.runtime.hand_over import HandOver, HandOvers, Push
from xllm_compile.runtime.kv_cache import KVCache
from xllm_compile.runtime.outputs import HandOverStats
from xllm_compile.runtime.reservations import Reservations
from xllm_compile.runtime.sequence import Sequence, SequenceStatus
from xllm_compile.runtime.transfer.endpoint import TransferEndpoint


class NoTransferError(RuntimeError):
    """The instance has no part in moving KV."""


@dataclass(eq=False, frozen=True, kw_only=True, slots=True)
class _SentPrefix:
    """Cached blocks on their way, in a slot of their own that keeps them where they are."""

    slot: int
    push: Push
    sent: "Future[int]"


class KVExchange:
    """What the engine tells of its sequences, and what it is told to do with their slots."""

    def __init__(
        self,
        kv_cache: KVCache,
        transfer: TransferEndpoint,
        *,
        clock: Callable[[], float],
        free: Callable[[int], None],
    ) -> None:
        """free takes slots back."""
        self.reservations = Reservations(kv_cache, transfer.receiver, clock=clock)
        self.addresses = transfer.receiver.addresses
        self._kv_cache = kv_cache
        self._free = free
        self._hand_overs = HandOvers(transfer.connect, kv_cache.config.bytes_per_token, clock=clock)
        self._handing_over: list[Sequence] = []
        """Computed, with a token, and not yet sent."""
        self._being_read: list[tuple[int, Push]] = []
        """Slots without a sequence that a push still reads."""
        self._prefixes: list[_SentPrefix] = []

    @property
    def num_held(self) -> int:
        """Places that are taken although nothing runs there."""
        num_sending = len(self._handing_over) + len(self._being_read) + len(self._prefixes)
        return self.reservations.num_held + num_sending

    def num_promised_blocks(self, horizon: int) -> int:
        """Free pages for what reserved sequences will generate in so many steps."""
        return self.reservations.num_growth_blocks(horizon)

    def watch(self, on_event: Callable[[], None]) -> None:
        self.reservations.on_revoked = self._hand_overs.on_rest = on_event

    def adopt(self, sequence: Sequence) -> bool:
        """Give the sequence the slot that was reserved for it, with what has arrived there. False: there is none."""
        request = sequence.request
        claimed = self.reservations.take(request.reservation_id) if request.reservation_id else None
        if claimed is None:
            return False
        # The last token is always computed: the next one comes of it.
        num_there = max(claimed.num_cached_tokens, min(request.num_kv_tokens, claimed.num_tokens))
        num_there = min(num_there, sequence.num_tokens - 1)
        self._kv_cache.shrink(claimed.slot, claimed.num_tokens - num_there)
        sequence.slot, sequence.num_computed_tokens = claimed.slot, num_there
        return True

    def push(self, computed: Iterable[tuple[Sequence, int]]) -> None:
        """A step ended, and with it the KV of the first tokens of these is there: send it."""
        for sequence, num_tokens in computed:
            if sequence.slot is None:
                continue
            if sequence.push is None:
                assert sequence.request.hand_over is not None
                sequence.push = self._hand_overs.start(sequence.request.request_id, sequence.request.hand_over)
            offsets = self._kv_cache.page_offsets(sequence.slot)
            sequence.push.advance(num_tokens, offsets, self._kv_cache.config.page_size)

    def hand_over(self, sequence: Sequence) -> None:
        """The sequence has its token, and ends when its KV is sent."""
        sequence.status = SequenceStatus.HANDING_OVER
        self._handing_over.append(sequence)

    def keeps(self, slot: int, sequence: Sequence) -> bool:
        """The sequence gives up its slot. True where that has to wait for a write that reads it."""
        if sequence.push is None:
            return False
        sequence.push.pause()
        is_read = sequence.push.is_busy
        if is_read:
            self._being_read.append((slot, sequence.push))
        return is_read

    def hold_prefix(self, digests: Items[bytes]) -> int:
        """A slot with what is cached here of a prompt that begins with these blocks, for `send_prefix`."""
        kv_cache = self._kv_cache
        chain = kv_cache.new_chain()
        chain.digests = list(digests)
        # As of a sequence with a token behind the blocks: else the last of them would not count as found.
        num_tokens = len(digests) * kv_cache.config.block_tokens + 1
        return kv_cache.allocate(chain, num_tokens, kv_cache.find(chain, num_tokens), is_query=False)

    def send_prefix(self, slot: int, target: HandOver) -> "Future[int]":
        """Send what the slot holds, and free it. Its copies have been made.

        The result, set by `tend`: tokens from the start that the receiver has by then.
        """
        kv_cache, sent = self._kv_cache, Future[int]()
        push = self._hand_overs.start("of a prefix", target)
        push.advance(kv_cache.length(slot), kv_cache.page_offsets(slot), kv_cache.config.page_size)
        self._prefixes.append(_SentPrefix(slot=slot, push=push, sent=sent))
        return sent

    def tend(self) -> list[Sequence]:
        """Free what nobody reads or writes any more. Returns sequences that were handed over, now finished."""
        self.reservations.tend()
        unread = [(slot, push) for slot, push in self._being_read if not push.is_busy]
        for each in unread:
            self._being_read.remove(each)
            self._free(each[0])
        for prefix in [prefix for prefix in self._prefixes if not prefix.push.is_busy]:
            self._prefixes.remove(prefix)
            self._free(prefix.slot)
            self._hand_overs.count_prefix(prefix.push)
            prefix.sent.set_result(prefix.push.num_sent_tokens)
        self._handing_over = [one for one in self._handing_over if one.status is SequenceStatus.HANDING_OVER]
        sent = [sequence for sequence in self._handing_over if sequence.push is None or not sequence.push.is_busy]
        for sequence in sent:
            self._handing_over.remove(sequence)
            self._finish(sequence)
        return sent

    def stats(self) -> HandOverStats:
        num_open = len(self._handing_over) + len(self._being_read) + len(self._prefixes)
        return self._hand_overs.stats(num_open=num_open)

    def close(self) -> None:
        """Ends what is being written and sent."""
        self._hand_overs.close()
        self.reservations.close()

    def _finish(self, sequence: Sequence) -> None:
        assert sequence.push is not None
        request = sequence.request
        request.num_kv_tokens, request.metrics.kv_sent = sequence.push.num_sent_tokens, sequence.push.sent
        # Of the newest token nothing is computed.
        self._hand_overs.count(request.request_id, sequence.push, sequence.num_tokens - 1)
        sequence.finish("handed_over")
