"""The engine of one instance: requests in, one token-packed step at a time, outputs out.

``step`` is the loop: schedule -> launch -> postprocess. With async scheduling the device runs one step while the host
plans the next one and reports the last one, in two stages; without, each step ends before the next is planned.
Either way a request's tokens are the same. `async_engine` puts a thread and asyncio around it, `llm` a plain loop.
"""

import itertools
import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from concurrent.futures import Future
from dataclasses import replace

from xllm_compile.runtime.batch import Batch, build_batch
from xllm_compile.runtime.engine_config import EngineConfig
from xllm_compile.runtime.hand_over import HandOver
from xllm_compile.runtime.kv_cache import KVCache
from xllm_compile.runtime.kv_events import KVEventLog, KVTier
from xllm_compile.runtime.kv_exchange import KVExchange, NoTransferError
from xllm_compile.runtime.local_scheduler import SchedulingRules
from xllm_compile.runtime.output_processor import (
    add_pooled,
    append_token,
    collect_prompt_logprobs,
    fail,
    finish_length,
    make_outputs,
)
from xllm_compile.runtime.outputs import EngineStats, RequestOutput
from xllm_compile.runtime.policies.chunk import StepLoad, load_of
from xllm_compile.runtime.policies.offline import OfflineRules
from xllm_compile.runtime.policies.queue_bound import QueueBound, check_queue
from xllm_compile.runtime.policies.state import Limits, Schedule
from xllm_compile.runtime.prefix_sharing import readable_chain, without_followers
from xllm_compile.runtime.request_factory import RequestFactory
from xllm_compile.runtime.reservations import Reservation, ReservationRequest
from xllm_compile.runtime.resume import Resume
from xllm_compile.runtime.sampler import SampledToken, SamplingFailure
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.runtime.sequence import Request, Sequence, SequenceStatus, num_queued_tokens
from xllm_compile.runtime.sequence_queues import SequenceQueues
from xllm_compile.runtime.speculative.speculator import Speculator
from xllm_compile.runtime.step import ModelRunner
from xllm_compile.runtime.step_executor import StepExecutor, StepResult
from xllm_compile.runtime.step_planner import StepPlanner
from xllm_compile.runtime.step_predictor import StepPredictor, StepPrior
from xllm_compile.runtime.steps_in_flight import StepsInFlight
from xllm_compile.runtime.tokenizer import Tokenizer
from xllm_compile.runtime.transfer.endpoint import TransferEndpoint


class Engine:
    """Belongs to one thread, but for `make_request` and `check_queue`, which change nothing, and `stats`."""

    def __init__(
        self,
        runner: ModelRunner,
        kv_cache: KVCache,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
        prior: StepPrior | None = None,
        speculator: Speculator | None = None,
        transfer: TransferEndpoint | None = None,
    ) -> None:
        """prior is what the build predicts of step times; without it the engine learns them from nothing.

        transfer takes KV from other instances and sends it to them; the engine closes it.
        """
        self.tokenizer = tokenizer
        self.config = config or EngineConfig()
        self.max_model_len = min(runner.max_model_len, kv_cache.config.max_model_len)
        self.vocab_size = runner.vocab_size
        self._runner = runner
        self._factory = RequestFactory(
            runner,
            tokenizer,
            self.config,
            max_model_len=self.max_model_len,
            new_chain=kv_cache.new_chain,
            kv_bytes_per_token=kv_cache.config.bytes_per_token,
            speculator=speculator,
            clock=clock,
        )
        self._kv_cache = kv_cache
        self._clock = clock
        self._limits = Limits(
            max_num_seqs=min(runner.max_num_seqs, kv_cache.num_slots, self.config.max_num_seqs or runner.max_num_seqs),
            max_num_batched_tokens=min(
                runner.max_num_batched_tokens, self.config.max_num_batched_tokens or runner.max_num_batched_tokens
            ),
        )
        tpot_slo_ms = self.config.tpot_slo_ms
        rules = SchedulingRules(
            order=self.config.order,
            admission_horizon=self.config.admission_horizon,
            offline=OfflineRules.within(None if tpot_slo_ms is None else tpot_slo_ms / 1e3),
        )
        self._predictor = StepPredictor(prior)
        self._requests: dict[str, Request] = {}
        """In order of arrival."""
        self._numbers = itertools.count()
        self._speculator = speculator
        self._executor = StepExecutor(
            runner,
            kv_cache.xtensor,
            kv_cache.num_slots,
            is_async=self.config.async_scheduling,
            speculator=speculator,
        )
        self._in_flight = StepsInFlight(self._executor, kv_cache)
        self._ended: dict[str, Request] = {}
        """Requests that ended between steps; the next step reports them."""
        self._stats = EngineStats(kv_tokens_total=kv_cache.total_tokens)
        self._exchange = (
            None if transfer is None else KVExchange(kv_cache, transfer, clock=clock, free=self._in_flight.give_back)
        )
        self._queues = SequenceQueues(kv_cache, self._in_flight, self._exchange, order=rules.order)
        self._planner = StepPlanner(
            self._queues,
            kv_cache,
            self._in_flight,
            self._exchange,
            self._predictor,
            limits=self._limits,
            rules=rules,
            max_model_len=self.max_model_len,
        )

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do. Requests that only wait for KV to be sent need `tend`."""
        return bool(len(self._queues.waiting) or self._queues.running or self._ended or len(self._in_flight))

    @property
    def is_settled(self) -> bool:
        """Whether the device is idle and everything was reported."""
        return not (len(self._in_flight) or self._ended)

    @property
    def num_open(self) -> int:
        """Requests that are not finished."""
        return len(self._requests)

    @property
    def limits(self) -> Limits:
        """What one step can take."""
        return self._limits

    @property
    def block_tokens(self) -> int:
        """Tokens of a block of KV, the unit in which prefixes are shared."""
        return self._kv_cache.config.block_tokens

    @property
    def kv_log(self) -> KVEventLog:
        """Told of the blocks that can be found here."""
        return self._kv_cache.log

    def kv_digests(self) -> dict[KVTier, list[bytes]]:
        """Of the blocks that can be found. May be called from any thread: see kv_events.py."""
        return self._kv_cache.digests()

    @property
    def kv_bytes_per_token(self) -> int:
        """From the KV of one token to that of the next."""
        return self._kv_cache.config.bytes_per_token

    @property
    def transfer_addresses(self) -> tuple[str, ...]:
        """Where others can send KV to, the fastest way first; none where it takes none."""
        return () if self._exchange is None else self._exchange.addresses

    def predicted_s(self, load: StepLoad) -> float:
        """Seconds that such a step takes, as believed now. May be called from any thread."""
        return self._predictor.seconds(load)

    @property
    def num_waiting(self) -> int:
        return len(self._queues.waiting)

    @property
    def num_waiting_tokens(self) -> int:
        return self._queues.waiting.num_tokens

    def add_request(
        self, request_id: str, prompt: str | Items[int], params: SamplingParams, resume: Resume | None = None
    ) -> None:
        """Queue a request. Raises ValueError on a bad prompt or option and QueueFullError when the queue is full."""
        request = self.make_request(request_id, prompt, params, resume=resume)
        self.check_queue(request, num_waiting=self.num_waiting, num_waiting_tokens=self.num_waiting_tokens)
        self.add(request)

    def make_request(
        self,
        request_id: str,
        prompt: str | Items[int],
        params: SamplingParams,
        prompt_text: str | None = None,
        resume: Resume | None = None,
        hand_over: HandOver | None = None,
    ) -> Request:
        """See RequestFactory.make. May be called from any thread. Raises NoTransferError for a hand_over."""
        if hand_over is not None:
            self._transferring()
        return self._factory.make(request_id, prompt, params, prompt_text, resume, hand_over)

    def prefetch(self, request: Request) -> "Future[None] | None":
        """Start to read from disk what is there of the prompt's KV; None where there is nothing to wait for.

        May be called from any thread, before `add`.
        """
        chain = readable_chain(request.sequences[0])
        if chain is None or self._kv_cache.tiers is None:
            return None
        chain.update(request.sequences[0].token_ids)
        return self._kv_cache.prefetch(chain)

    def check_queue(self, request: Request, *, num_waiting: int, num_waiting_tokens: int) -> None:
        """Raise QueueFullError when the request does not fit behind what waits. May be called from any thread."""
        bound = QueueBound(max_waiting=self.config.max_waiting, max_tokens=self.config.max_waiting_tokens)
        check_queue(
            num_waiting=num_waiting,
            num_waiting_tokens=num_waiting_tokens,
            num_new=len(request.sequences),
            num_new_tokens=num_queued_tokens(request.sequences),
            bound=bound.offline() if request.params.offline else bound,
            time=self._planner.service_time(),
        )

    def add(self, request: Request) -> None:
        """Queue a request from make_request. Raises ValueError when its id is in use."""
        if request.request_id in self._requests or request.request_id in self._ended:
            raise ValueError(f"request_id={request.request_id!r} is already in use; choose another")
        if request.is_finished:
            # It was resumed with its last token.
            self._ended[request.request_id] = request
            self.give_up(request)
            return
        self._requests[request.request_id] = request
        for sequence in request.sequences:
            sequence.number = next(self._numbers)
            self._queues.add(sequence, self._clock())

    def reserve(self, wanted: ReservationRequest) -> Reservation:
        """Hold a slot for a sequence whose KV another instance sends.

        Steps keep its TPOT target, as they will once it is here: it may come while one runs. Raises QueueFullError
        where there is no room now, ValueError, NoTransferError.
        """
        exchange = self._transferring()
        known = exchange.reservations.renewed(wanted)
        if known is not None:
            return known
        self._factory.check_prompt(wanted.token_ids, num_new=1)
        # The sender does not wait for steps: none may be under way that reads or copies what the reservation gets.
        self._complete(self._ended, num_left=0)
        self._planner.check_room(len(wanted.token_ids))
        reservation = exchange.reservations.open(wanted)
        self._executor.prepare_memory(self._kv_cache.ops.take(), self._kv_cache.ops.take_restores())
        return reservation

    def send_prefix(self, digests: Items[bytes], target: HandOver) -> "Future[int]":
        """Send the KV that is cached here of a prompt which begins with these blocks: see KVExchange.send_prefix.

        Raises QueueFullError where there is no room now, ValueError, NoTransferError.
        """
        exchange = self._transferring()
        num_tokens = len(digests) * self.block_tokens
        if num_tokens * self.kv_bytes_per_token > target.num_bytes or num_tokens >= self.max_model_len:
            raise ValueError(
                f"a prefix of {num_tokens} tokens is more than its target's {target.num_bytes} bytes, or"
                f" max_model_len={self.max_model_len}, hold; send the blocks of one prompt to a reservation for it"
            )
        # What is found may belong to a step under way, and its slot may need copies.
        self._complete(self._ended, num_left=0)
        self._planner.check_room(num_tokens)
        slot = exchange.hold_prefix(digests)
        self._executor.prepare_memory(self._kv_cache.ops.take(), self._kv_cache.ops.take_restores())
        return exchange.send_prefix(slot, target)

    def release(self, reservation_id: str) -> "Future[None] | None":
        """See Reservations.release. Raises NoTransferError."""
        return self._transferring().reservations.release(reservation_id)

    def release_all(self, holder: str) -> None:
        """See Reservations.release_all."""
        if self._exchange is not None:
            self._exchange.reservations.release_all(holder)

    def claim(self, request: Request) -> "Future[None] | None":
        """Keep the request's reservation for it, before `add`: see Reservations.claim."""
        if self._exchange is None:
            return None
        return self._exchange.reservations.claim(request.reservation_id, request.sequences[0].token_ids)

    def give_up(self, request: Request) -> None:
        """A request that may have claimed its reservation is not added after all."""
        if self._exchange is not None and request.reservation_id:
            self._exchange.reservations.release(request.reservation_id)

    def watch(self, on_event: Callable[[], None]) -> None:
        """Call it, in any thread, when `tend` has something to do. A `step` that waits for the device returns then."""

        def wake() -> None:
            self.interrupt()
            on_event()

        if self._exchange is not None:
            self._exchange.watch(wake)

    def interrupt(self) -> None:
        """Have a `step` that waits for the device return, or the next one that would. May be called from any thread."""
        self._executor.interrupt()

    def hand_over(self, request_id: str, target: HandOver) -> None:
        """Send the KV of a request that is under way to where it goes on, and end it with the tokens it has.

        Unknown ids, and requests that are being handed over already, are ignored. Raises NoTransferError.
        """
        exchange, request = self._transferring(), self._requests.get(request_id)
        if request is None or request.hand_over is not None or len(request.sequences) != 1:
            return
        # What is on its way to it must be there first; it may end by that.
        self._complete(self._ended, num_left=0)
        (sequence,) = request.sequences
        if sequence.is_finished:
            return
        request.hand_over = target
        if sequence.status is SequenceStatus.WAITING:
            # It has nothing to send.
            self._queues.leave(sequence)
            sequence.finish("handed_over")
            self._close(request)
            return
        exchange.push([(sequence, sequence.num_computed_tokens)])
        exchange.hand_over(sequence)
        self._queues.forget_ended()

    def tend(self) -> float | None:
        """Take note of what came of KV that other threads and instances read and write, between two steps.

        Returns the seconds after which it wants to be called again at the latest.
        """
        if self._exchange is None:
            return None
        for sequence in self._exchange.tend():
            self._queues.release(sequence)
            self._close(sequence.request)
        return self._exchange.reservations.next_due_s()

    def abort(self, request_id: str) -> None:
        """End a request now; the next step reports it with finish_reason "abort". Unknown ids are ignored."""
        request = self._requests.get(request_id)
        if request is None:
            return
        for sequence in request.sequences:
            if not sequence.is_finished:
                self._queues.leave(sequence)
                sequence.detokenizer.finish()
                sequence.finish("abort")
        self._queues.forget_ended()
        self._stats.num_aborted += 1
        self._close(request)

    def step(self) -> list[RequestOutput]:
        """Launch one step and report the one before, which is the same one without async scheduling.

        Where it is too early to plan the next one it waits for the time, or an interruption, and launches none.
        Returns the outputs of the requests that changed, in order of arrival. Raises what the model runner raises.
        """
        changed, self._ended = self._ended, {}
        # What is known before the step does not wait until the device is done with it.
        may_wait = not (changed and self._executor.is_async)
        if self._in_flight.is_early:
            if may_wait:
                self._in_flight.wait_to_plan()
            return make_outputs(changed.values())
        num_left = 1
        if len(self._in_flight) < 2:
            plan = self._schedule(changed)
            if plan.chunks:
                self._launch(plan)
            num_left = 1 if plan.chunks and self._executor.is_async else 0
        if may_wait:
            self._complete(changed, num_left=num_left, until_interrupted=True)
        if not self.has_work:
            self._in_flight.rest()
            if self._kv_cache.share is not None:
                # From here on nobody would say that this model has no use for its pages.
                self._kv_cache.balance(0)
        return make_outputs(changed.values())

    def settle(self) -> list[RequestOutput]:
        """Launch nothing and report what is on its way. Afterwards the device is idle until the next `step`."""
        changed, self._ended = self._ended, {}
        self._complete(changed, num_left=0)
        self._in_flight.rest()
        return make_outputs(changed.values())

    @property
    def is_asked_for_pages(self) -> bool:
        """Whether another model lacks pages that this one may do without: `give_pages` answers."""
        share = self._kv_cache.share
        return share is not None and share.num_asked > 0

    def on_asked_for_pages(self, callback: Callable[[], None]) -> None:
        """Have the callback called, from another model's thread, when is_asked_for_pages becomes true."""
        if self._kv_cache.share is not None:
            self._kv_cache.share.on_asked = callback

    def give_pages(self) -> list[RequestOutput]:
        """Report what is on its way, and give up pages that another model lacks as far as this one can."""
        outputs = self.settle()
        self._kv_cache.balance(self._planner.num_wanted_pages())
        return outputs

    def release_memory(self) -> None:
        """Give the memory of KV that no running sequence holds back. The device must be at rest.

        Raises ValueError where the memory is shared and sequences run.
        """
        if self._kv_cache.share is not None and self._requests:
            raise ValueError(
                f"{len(self._requests)} requests are paused and hold KV; resume or abort them before the model sleeps"
            )
        self._kv_cache.sleep()

    def take_memory(self) -> None:
        """Have the memory for KV again; may wait for other models. Raises SharedMemoryFullError, changing nothing."""
        self._kv_cache.wake_up()

    def close(self) -> None:
        """Wait for the device to be idle. No step comes after."""
        if self._exchange is not None:
            self._exchange.close()
        self._executor.close()
        self._kv_cache.close()

    def stats(self) -> EngineStats:
        """A snapshot of the counters."""
        waiting, running = self._queues.waiting, list(self._queues.running)
        decoding = [sequence for sequence in running if sequence.is_behind_prompt]
        prefilling = [sequence for sequence in running if not sequence.is_behind_prompt]
        return replace(
            self._stats,
            num_running=len(running),
            num_waiting=len(waiting),
            num_waiting_tokens=waiting.num_tokens + sum(each.num_uncomputed_tokens for each in prefilling),
            num_late_waiting_tokens=self._planner.num_late_tokens(self._clock()),
            num_decoding=len(decoding),
            num_context_tokens=sum(each.num_computed_tokens for each in decoding),
            num_offline_running=sum(each.is_offline for each in running),
            num_offline_waiting=waiting.num_offline,
            num_offline_waiting_tokens=waiting.num_offline_tokens
            + sum(each.num_uncomputed_tokens for each in prefilling if each.is_offline),
            num_offline_decoding=sum(each.is_offline for each in decoding),
            num_offline_context_tokens=sum(each.num_computed_tokens for each in decoding if each.is_offline),
            kv_tokens_used=self._kv_cache.used_tokens,
            kv_tokens_total=self._kv_cache.total_tokens,
            kv_pages=self._kv_cache.num_pages_by_state(),
            prefix_queried_tokens=self._kv_cache.stats.num_queried_tokens,
            prefix_hit_tokens=self._kv_cache.stats.num_hit_tokens,
            kv_tiers=self._kv_cache.tiers.stats if self._kv_cache.tiers else None,
            kv_swap_bytes=self._kv_cache.swap.num_bytes if self._kv_cache.swap else None,
            num_steps=self._in_flight.num_completed,
            busy_s=self._in_flight.busy_s,
            gap_s=self._in_flight.gap_s,
            step_error_ratio=self._predictor.error_ratio,
            graph_cache=self._runner.graph_cache_stats(),
            speculation=None if self._speculator is None else self._speculator.stats(),
            reservations=None if self._exchange is None else self._exchange.reservations.stats(),
            hand_overs=None if self._exchange is None else self._exchange.stats(),
        )

    def _schedule(self, changed: dict[str, Request]) -> Schedule[Sequence]:
        """Decide the step and bring queues and KV slots in line with it."""
        if self._kv_cache.share is not None:
            if self.is_asked_for_pages:
                self._complete(changed, num_left=0)
            self._kv_cache.balance(self._planner.num_wanted_pages())
        plan = self._plan()
        if len(self._in_flight) and (plan.preempted or plan.swapped or plan.too_large):
            # Whoever loses its place must have its token first, and memory may come free by itself.
            self._complete(changed, num_left=0)
            plan = self._plan()
        self._stats.num_offline_held_back += plan.num_held_back
        for sequence in plan.swapped:
            self._stats.num_swaps += self._queues.swap_out(sequence)
        for sequence in sorted((*plan.preempted, *plan.swapped), key=lambda sequence: sequence.number):
            self._queues.preempt(sequence)
            self._stats.num_preemptions += 1
            self._stats.num_offline_preemptions += sequence.is_offline
        for sequence in plan.too_large:
            self._queues.leave(sequence)
            finish_length(sequence)
            self._report(sequence, changed)
        now = self._clock()
        plan.chunks = list(without_followers(plan.chunks, self._kv_cache))
        # All that is shared is held before anybody takes pages.
        for sequence, _ in plan.chunks:
            if sequence.slot is None:
                self._queues.start(sequence, now)
        plan.chunks = [(sequence, min(count, sequence.num_uncomputed_tokens)) for sequence, count in plan.chunks]
        for sequence, count in plan.chunks:
            assert sequence.slot is not None
            has_room = self._kv_cache.extend(sequence.slot, count)
            assert has_room, "the scheduler counts no fewer pages than the cache"
        self._queues.forget_ended()
        return plan

    def _plan(self) -> Schedule[Sequence]:
        # By what is late when the step begins.
        return self._planner.plan(now=self._clock() + self._in_flight.left_s(), elder=self._elder())

    def _elder(self) -> Sequence | None:
        """The oldest sequence, once it is so old that policies give way to it."""
        oldest = next(iter(self._requests.values()), None)
        if oldest is None or self._clock() - oldest.metrics.arrival_s <= self.config.starvation_s:
            return None
        queued = (SequenceStatus.WAITING, SequenceStatus.RUNNING)
        elder = next((sequence for sequence in oldest.sequences if sequence.status in queued), None)
        return elder if elder is not None and self._planner.is_elders_step(elder, self._clock()) else None

    def _launch(self, plan: Schedule[Sequence]) -> None:
        """Hand the step to the device. From here on its sequences count as computed, with a token to come."""
        granted = self._planner.grant_drafts(plan.chunks, self._speculator)
        ops = self._kv_cache.ops
        batch = build_batch(plan.chunks, ops.take(), granted, ops.take_restores())
        load = load_of(plan.chunks)
        for sequence, count in plan.chunks:
            sequence.num_computed_tokens += count
            self._queues.commit(sequence)
        for sequence, count in granted.items():
            sequence.num_draft_tokens += count
        for sequence in batch.sampled:
            sequence.num_pending_tokens += 1
        for rows in batch.prompt_rows:
            rows.sequence.request.num_prompt_logprobs_asked += len(rows.token_ids)
        requests = list({id(sequence.request): sequence.request for sequence, _ in plan.chunks}.values())
        computed = [(one, one.num_computed_tokens) for one, _ in plan.chunks if one.request.hand_over is not None]
        predicted_s = self._predictor.seconds(load)
        self._in_flight.launch(batch, requests=requests, load=load, predicted_s=predicted_s, computed=computed)

    def _complete(self, changed: dict[str, Request], *, num_left: int, until_interrupted: bool = False) -> None:
        """Wait for launched steps until so many are left, and give their tokens to their sequences."""
        while len(self._in_flight) > num_left:
            completed = self._in_flight.complete()
            if completed is None:
                if until_interrupted:
                    return
                continue
            step, result = completed
            if not any(result.num_drafted):
                # A step that guesses and verifies says little of the others.
                load = step.load._replace(num_tokens=step.load.num_tokens + sum(result.num_forced))
                self._predictor.observe(load, result.ended_s - result.started_s)
            for request in step.requests:
                if not request.is_finished:
                    request.metrics.graph_steps[result.outcome] += 1
            if self._exchange is not None:
                self._exchange.push(step.computed)
            self._postprocess(step.batch, result, changed)

    def _postprocess(self, batch: Batch, result: StepResult, changed: dict[str, Request]) -> None:
        now = self._clock()
        collect_prompt_logprobs(batch.prompt_rows, result.prompt_logprobs, self.tokenizer)
        self._settle_drafts(batch, result)
        for sequence, tokens in zip(batch.sampled, result.sampled, strict=True):
            sequence.num_pending_tokens -= 1
            if sequence.is_finished:
                # It ended while this step was already under way.
                continue
            for sampled in tokens:
                if sequence.is_finished:
                    # A draft was accepted beyond the end.
                    break
                self._append(sequence, sampled, now)
            if sequence.is_finished:
                self._queues.release(sequence)
                self._planner.output_length.learn(sequence.num_output_tokens)
            elif self._exchange is not None and sequence.request.hand_over is not None:
                self._exchange.hand_over(sequence)
            self._report(sequence, changed)
        for rows, pooled in zip(batch.pool_rows, result.pooled, strict=True):
            if not rows.sequence.is_finished and add_pooled(rows, pooled, now):
                self._stats.num_prompt_tokens += rows.sequence.num_prompt_tokens
                self._queues.release(rows.sequence)
                self._report(rows.sequence, changed)
        self._queues.forget_ended()

    def _append(self, sequence: Sequence, sampled: SampledToken | SamplingFailure, now: float) -> None:
        if isinstance(sampled, SamplingFailure):
            fail(sequence, sampled.reason)
            return
        append_token(sequence, sampled, self.tokenizer)
        self._stats.num_generated_tokens += 1
        self._stats.num_offline_generated_tokens += sequence.is_offline
        if sequence.num_output_tokens == 1:
            # Once per sequence, however often a preemption has it computed again.
            self._stats.num_prompt_tokens += sequence.num_prompt_tokens
        metrics = sequence.request.metrics
        if metrics.first_token_s is None:
            metrics.first_token_s = now
        metrics.last_token_s = now

    def _settle_drafts(self, batch: Batch, result: StepResult) -> None:
        """Accepted tokens are computed; the room of the others is given back."""
        for sequence, num_granted, num_drafted, num_forced, tokens in zip(
            batch.sampled, batch.num_granted, result.num_drafted, result.num_forced, result.sampled, strict=False
        ):
            num_accepted, metrics = len(tokens) - 1, sequence.request.metrics
            sequence.num_draft_tokens -= num_granted
            sequence.num_computed_tokens += num_accepted
            metrics.num_draft_tokens += num_drafted
            if num_forced:
                metrics.num_forced_tokens += num_accepted
                self._stats.num_forced_tokens += num_accepted
            else:
                metrics.num_accepted_tokens += num_accepted
            if sequence.slot is not None and num_granted > num_accepted:
                self._kv_cache.shrink(sequence.slot, num_granted - num_accepted)

    def _report(self, sequence: Sequence, changed: dict[str, Request]) -> None:
        request = sequence.request
        changed[request.request_id] = request
        if request.is_finished and self._requests.pop(request.request_id, None) is not None:
            self._stop_speculating(request)

    def _close(self, request: Request) -> None:
        """Report a request that ended between two steps."""
        del self._requests[request.request_id]
        self._ended[request.request_id] = request
        self._stop_speculating(request)

    def _stop_speculating(self, request: Request) -> None:
        for sequence in request.sequences:
            if self._speculator is not None and sequence.speculation is not None:
                self._speculator.forget(sequence.speculation)

    def _transferring(self) -> KVExchange:
        if self._exchange is None:
            raise NoTransferError(
                "this instance neither takes nor sends KV: it was started without --transfer, or its artifact has"
                " several ranks, of which a transfer would move one only"
            )
        return self._exchange
