"""Which sequences wait and which run, and how one comes into its KV slot and out of it.

A sequence that runs has a slot; one that waits has none, and what it would find cached or swapped out is looked up when
a step is planned. A slot that is given up outlives the launched steps and the transfers that have it.
"""

import logging

from xllm_compile.runtime.kv_cache import KVCache
from xllm_compile.runtime.kv_exchange import KVExchange
from xllm_compile.runtime.policies.order import Order
from xllm_compile.runtime.policies.waiting_queue import WaitingQueue
from xllm_compile.runtime.prefix_sharing import readable_chain
from xllm_compile.runtime.sequence import Sequence, SequenceStatus
from xllm_compile.runtime.steps_in_flight import StepsInFlight

logger = logging.getLogger(__name__)


class SequenceQueues:
    """Decides nothing. Belongs to the engine's thread."""

    def __init__(
        self, kv_cache: KVCache, in_flight: StepsInFlight, exchange: KVExchange | None, *, order: Order
    ) -> None:
        self.waiting: WaitingQueue[Sequence] = WaitingQueue(order.queue_key)
        self.running: list[Sequence] = []
        """In the order in which they were started."""
        self._kv_cache = kv_cache
        self._in_flight = in_flight
        self._exchange = exchange

    def add(self, sequence: Sequence, now: float) -> None:
        """A new one waits, but where its place was kept for it: it was admitted when that was reserved."""
        if self._exchange is not None and self._exchange.adopt(sequence):
            self._run(sequence, now)
        else:
            self.waiting.add(sequence)

    def start(self, sequence: Sequence, now: float) -> None:
        """A waiting one gets a slot, and in it what was found of its tokens."""
        self.waiting.remove(sequence)
        num_cached = sequence.num_computed_tokens
        swapped, sequence.swapped = sequence.swapped, None
        sequence.slot = self._kv_cache.allocate(readable_chain(sequence), sequence.num_tokens, num_cached, swapped)
        sequence.num_computed_tokens, sequence.num_unheld_blocks = self._kv_cache.length(sequence.slot), 0
        self._run(sequence, now)

    def swap_out(self, sequence: Sequence) -> bool:
        """Copy out the KV of one that will be preempted, if there still is room."""
        if sequence.request.params.pooling is not None or sequence.num_computed_tokens == 0:
            # Of an embedding all is computed in one go.
            return False
        assert sequence.slot is not None
        sequence.swapped = self._kv_cache.swap_out(sequence.slot, sequence.num_computed_tokens)
        return sequence.swapped is not None

    def preempt(self, sequence: Sequence) -> None:
        """A running one waits again. It has all its tokens: no launched step brings more."""
        self.release(sequence)
        sequence.rewind()
        self.waiting.add(sequence)
        sequence.request.metrics.num_preemptions += 1
        logger.debug("request %s preempted at %d tokens", sequence.request.request_id, sequence.num_tokens)

    def leave(self, sequence: Sequence) -> None:
        """One that ends: out of the waiting queue, or out of its slot."""
        if sequence.status is SequenceStatus.WAITING:
            self.waiting.remove(sequence)
            if sequence.swapped is not None:
                self._kv_cache.drop_swapped(sequence.swapped)
                sequence.swapped = None
        self.release(sequence)

    def release(self, sequence: Sequence) -> None:
        """Give up its slot, if it has one."""
        if sequence.slot is None:
            return
        self.commit(sequence)
        slot, sequence.slot = sequence.slot, None
        if self._exchange is None or not self._exchange.keeps(slot, sequence):
            self._in_flight.give_back(slot)

    def commit(self, sequence: Sequence) -> None:
        """Let others find its full blocks. Of tokens that launched steps sample the ids are not known yet."""
        assert sequence.slot is not None
        if sequence.chain is not None:
            sequence.chain.update(sequence.token_ids)
        self._kv_cache.commit(sequence.slot, sequence.chain, sequence.num_computed_tokens)

    def forget_ended(self) -> None:
        """Drop those that were finished, preempted or are handed over from the running ones."""
        self.running = [sequence for sequence in self.running if sequence.status is SequenceStatus.RUNNING]

    def count_own_pages(self) -> None:
        """Note by how many pages each running one would free memory."""
        for sequence in self.running:
            assert sequence.slot is not None
            sequence.num_kv_blocks = self._kv_cache.num_own_pages(sequence.slot)

    def _run(self, sequence: Sequence, now: float) -> None:
        """It has a slot, and what is computed of it is there."""
        sequence.status = SequenceStatus.RUNNING
        self.running.append(sequence)
        request = sequence.request
        if request.metrics.scheduled_s is None:
            request.metrics.scheduled_s = now
            request.num_cached_tokens = sequence.num_computed_tokens
