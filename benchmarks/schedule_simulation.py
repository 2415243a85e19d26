"""One engine of plain data on a fake clock: arrivals in, the scheduler decides, predicted steps pass the time.

The scheduler, its queue and its predictor are those that serve; only the steps are not run.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from xllm_compile.runtime.local_scheduler import SchedulingRules, schedule
from xllm_compile.runtime.policies.chunk import StepLoad, load_of
from xllm_compile.runtime.policies.order import STARVATION_S
from xllm_compile.runtime.policies.state import Capacity, Limits, Schedule
from xllm_compile.runtime.policies.waiting_queue import WaitingQueue
from xllm_compile.runtime.step_predictor import StepPredictor, StepPrior

StepTruth = Callable[[StepLoad], float]
# Steps of one load differ by about this much on a quiet machine.
_NOISE = 0.03


@dataclass(eq=False, kw_only=True, slots=True)
class SimulatedSequence:
    """A request of the trace. It ends after ``num_outputs_wanted`` tokens, which the scheduler does not know."""

    number: int
    kind: str
    arrival_s: float
    num_prompt_tokens: int
    num_outputs_wanted: int
    max_tokens: int
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    is_offline: bool = False
    is_begun: bool = False
    priority: int = 0
    num_computed_tokens: int = 0
    num_outputs: int = 0
    num_preemptions: int = 0
    first_token_s: float | None = None
    last_token_s: float | None = None

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_outputs - self.num_computed_tokens

    @property
    def max_chunk_tokens(self) -> int:
        return self.num_uncomputed_tokens

    @property
    def num_growth_tokens(self) -> int:
        return max(0, self.max_tokens - self.num_outputs - 1)

    @property
    def num_kv_blocks(self) -> int:
        return self.num_computed_tokens

    @property
    def num_unheld_blocks(self) -> int:
        return 0

    @property
    def first_deadline_s(self) -> float:
        if self.num_outputs:
            return -math.inf
        return math.inf if self.ttft_slo_s is None else self.arrival_s + self.ttft_slo_s

    @property
    def next_due_s(self) -> float:
        if self.first_token_s is None or self.tpot_slo_s is None:
            return math.inf
        return self.first_token_s + self.num_outputs * self.tpot_slo_s

    @property
    def ttft_s(self) -> float:
        assert self.first_token_s is not None
        return self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """None for a single token."""
        assert self.first_token_s is not None and self.last_token_s is not None
        if self.num_outputs < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.num_outputs - 1)


@dataclass(kw_only=True, slots=True)
class SimulatedEngine:
    rules: SchedulingRules
    limits: Limits
    num_kv_tokens: int
    prior: StepPrior
    truth: StepTruth
    starvation_s: float = STARVATION_S
    seed: int = 0
    now: float = 0.0
    num_steps: int = 0
    running: list[SimulatedSequence] = field(default_factory=list)

    def run(self, arrivals: Sequence[SimulatedSequence]) -> None:
        """Serve all of them, given in order of arrival. What does not fit the KV cache alone stays without a token."""
        waiting: WaitingQueue[SimulatedSequence] = WaitingQueue(self.rules.order.queue_key)
        predictor = StepPredictor(self.prior)
        noise = random.Random(self.seed)
        arrived = 0
        while arrived < len(arrivals) or len(waiting) or self.running:
            if not len(waiting) and not self.running:
                self.now = max(self.now, arrivals[arrived].arrival_s)
            while arrived < len(arrivals) and arrivals[arrived].arrival_s <= self.now:
                waiting.add(arrivals[arrived])
                arrived += 1
            plan = self._plan(waiting, predictor)
            load = load_of(plan.chunks)
            seconds = self.truth(load) * max(0.5, noise.gauss(1, _NOISE)) if plan.chunks else 0.0
            self.now += seconds
            predictor.observe(load, seconds)
            self.num_steps += 1
            self._apply(plan, waiting)

    def _plan(self, waiting: WaitingQueue[SimulatedSequence], predictor: StepPredictor) -> Schedule[SimulatedSequence]:
        used = sum(sequence.num_kv_blocks for sequence in self.running)
        # Numbers follow arrival, so the oldest is the first of its kind in queue or batch.
        oldest = min((*waiting, *self.running), key=lambda sequence: sequence.number)
        token_s = predictor.token_s(self.limits.max_num_batched_tokens)
        is_elder = self.now - oldest.arrival_s > self.starvation_s and self.rules.order.is_elders_step(
            oldest, self.num_steps, self.now, token_s
        )
        return schedule(
            waiting,
            self.running,
            self.limits,
            Capacity(num_blocks=self.num_kv_tokens, num_free_blocks=self.num_kv_tokens - used),
            predictor,
            rules=self.rules,
            now=self.now,
            token_s=token_s,
            elder=oldest if is_elder else None,
        )

    def _apply(self, plan: Schedule[SimulatedSequence], waiting: WaitingQueue[SimulatedSequence]) -> None:
        for sequence in plan.preempted:
            self.running.remove(sequence)
            sequence.num_computed_tokens = 0
            sequence.num_preemptions += 1
            waiting.add(sequence)
        for sequence in plan.too_large:
            if sequence.num_computed_tokens:
                self.running.remove(sequence)
            else:
                waiting.remove(sequence)
        for sequence, count in plan.chunks:
            if sequence.num_computed_tokens == 0:
                waiting.remove(sequence)
                self.running.append(sequence)
            sequence.num_computed_tokens += count
            if sequence.num_uncomputed_tokens == 0:
                sequence.num_outputs += 1
                sequence.last_token_s = self.now
                sequence.first_token_s = sequence.first_token_s or self.now
        self.running = [s for s in self.running if s.num_outputs < s.num_outputs_wanted]
