"""What the policies are told of an engine's sequences, KV cache and step times, and what they answer.

`policies/` and `local_scheduler` are functions over plain data; here that data is read off. Nothing here changes a
queue: the engine acts on the plan.
"""

import math
from collections.abc import Sequence as Items

from xllm_compile.runtime.kv_cache import KVCache
from xllm_compile.runtime.kv_exchange import KVExchange
from xllm_compile.runtime.local_scheduler import SchedulingRules, schedule
from xllm_compile.runtime.policies.admission import lacks_room
from xllm_compile.runtime.policies.chunk import StepLoad
from xllm_compile.runtime.policies.output_length import OutputLength
from xllm_compile.runtime.policies.preemption import swap_pays
from xllm_compile.runtime.policies.queue_bound import QueueFullError, ServiceTime
from xllm_compile.runtime.policies.state import Capacity, Limits, Schedule
from xllm_compile.runtime.prefix_sharing import look_up
from xllm_compile.runtime.sequence import Sequence
from xllm_compile.runtime.sequence_queues import SequenceQueues
from xllm_compile.runtime.speculative.speculator import Speculator
from xllm_compile.runtime.step_predictor import StepPredictor
from xllm_compile.runtime.steps_in_flight import StepsInFlight


class StepPlanner:
    """Belongs to the engine's thread, but for `service_time` and `num_late_tokens`."""

    def __init__(
        self,
        queues: SequenceQueues,
        kv_cache: KVCache,
        in_flight: StepsInFlight,
        exchange: KVExchange | None,
        predictor: StepPredictor,
        *,
        limits: Limits,
        rules: SchedulingRules,
        max_model_len: int,
    ) -> None:
        self._queues = queues
        self._kv_cache = kv_cache
        self._in_flight = in_flight
        self._exchange = exchange
        self._predictor = predictor
        self._limits = limits
        self._rules = rules
        self._max_model_len = max_model_len
        self.output_length = OutputLength()

    def plan(self, *, now: float, elder: Sequence | None) -> Schedule[Sequence]:
        """The next step, of the queues as they are. elder is as policies/order.py has it."""
        waiting, running = self._queues.waiting, self._queues.running
        capacity = self._capacity()
        look_up(self._kv_cache, waiting, self._limits.max_num_seqs)
        most_new = len(running) + capacity.blocks(self._limits.max_num_batched_tokens)
        if len(waiting) or capacity.num_free_blocks < most_new:
            # Else nobody can lose its place in this step, and what it would free does not matter.
            self._queues.count_own_pages()
        return schedule(
            waiting,
            running,
            self._limits,
            capacity,
            self._predictor,
            rules=self._rules,
            now=now,
            token_s=self._token_s(),
            elder=elder,
            awaited_s=self._awaited_s(),
        )

    def grant_drafts(self, chunks: Items[tuple[Sequence, int]], speculator: Speculator | None) -> dict[Sequence, int]:
        """Drafted tokens that decoding sequences may verify in the step, from what its plan leaves of tokens and KV.

        Their slots have room for them then. Sequences whose launched step verifies drafts get 0 at least: their
        positions are not known yet.
        """
        granted: dict[Sequence, int] = {}
        if speculator is None:
            return granted
        tokens_left = self._limits.max_num_batched_tokens - sum(count for _, count in chunks)
        for sequence, _ in chunks:
            if sequence.speculation is None or not sequence.is_decoding:
                continue
            assert sequence.slot is not None
            wanted = min(speculator.reserve(sequence.speculation), sequence.num_left_tokens - 1, tokens_left)
            if wanted > 0 and self._kv_cache.extend(sequence.slot, wanted):
                tokens_left -= wanted
                granted[sequence] = wanted
            elif sequence.num_draft_tokens:
                granted[sequence] = 0
        return granted

    def check_room(self, num_tokens: int) -> None:
        """Raise QueueFullError when a sequence of so many tokens does not fit beside what runs and what is reserved."""
        self._queues.count_own_pages()
        full = lacks_room(
            num_tokens,
            self._queues.running,
            self._capacity(),
            self._limits,
            horizon=self._rules.admission_horizon,
            steps=self._max_model_len - num_tokens,
        )
        if full is not None:
            drain_s = self.service_time().drain_s(1, num_tokens)
            raise QueueFullError(f"{full}; retry later, or reserve elsewhere", drain_s)

    def num_wanted_pages(self) -> int:
        """Pages that running and waiting sequences would take within the admission horizon, were there enough."""
        waiting, running = self._queues.waiting, self._queues.running
        page_tokens = self._kv_cache.page_tokens
        num_new = min(len(waiting), self._limits.max_num_seqs)
        num_tokens = min(waiting.num_tokens, num_new * self._max_model_len)
        num_tokens += sum(sequence.num_uncomputed_tokens for sequence in running)
        # Each may grow to the horizon, and its last page may be all but empty.
        growth = (len(running) + num_new) * (self._rules.admission_horizon + page_tokens)
        return -(-(num_tokens + growth) // page_tokens)

    def is_elders_step(self, elder: Sequence, now: float) -> bool:
        """See Order.is_elders_step, of the next step."""
        return self._rules.order.is_elders_step(elder, self._in_flight.num_completed, now, self._token_s())

    def num_late_tokens(self, now: float) -> int:
        """Prompt tokens of online sequences that let others go first, since they are late. May be called from any
        thread."""
        order, token_s = self._rules.order, self._token_s()
        prefilling = [one for one in self._queues.running if not one.is_behind_prompt]
        return sum(
            one.num_uncomputed_tokens
            for one in (*self._queues.waiting, *prefilling)
            if not one.is_offline and order.is_late(one, now, token_s)
        )

    def service_time(self) -> ServiceTime:
        """What waiting work takes, as predicted now. May be called from any thread."""
        num_seqs = self._limits.max_num_seqs
        decode = StepLoad(num_tokens=num_seqs, num_seqs=num_seqs, num_keys=self._kv_cache.used_tokens)
        return ServiceTime(
            token_s=self._token_s(),
            sequence_s=self.output_length.mean_tokens * self._predictor.seconds(decode) / num_seqs,
        )

    def _awaited_s(self) -> float:
        if self._exchange is None:
            return math.inf
        return self._exchange.reservations.step_s(self.output_length)

    def _token_s(self) -> float:
        """To prefill one token, as predicted now."""
        return self._predictor.token_s(self._limits.max_num_batched_tokens)

    def _capacity(self) -> Capacity:
        exchange, num_ended = self._exchange, self._in_flight.num_ended_slots
        return Capacity(
            num_blocks=self._kv_cache.num_pages,
            num_free_blocks=self._kv_cache.num_free_pages,
            block_tokens=self._kv_cache.page_tokens,
            num_held_seqs=num_ended + (exchange.num_held if exchange else 0),
            num_promised_blocks=exchange.num_promised_blocks(self._rules.admission_horizon) if exchange else 0,
            swap_pays=None if self._kv_cache.swap is None else self._swap_pays,
        )

    def _swap_pays(self, num_tokens: int) -> bool:
        swap, token_bytes = self._kv_cache.swap, self._kv_cache.config.bytes_per_token
        assert swap is not None
        if not swap.has_room(num_tokens * token_bytes):
            return False
        return swap_pays(num_tokens, self._limits.max_num_batched_tokens, self._predictor, swap.path(token_bytes))
