"""Which tokens ride in the next step: a pure function over the queues, and the bound of the waiting queue.

Decodes first, one token each; then prompts in order of arrival, cut into chunks that fill the step. When live tokens
would outgrow the KV budget, the running sequence that arrived last is preempted: its KV is dropped and it is computed
again, prompt and generated tokens, once there is room. The oldest running sequence may preempt all others, so it
always moves on, finishes, and makes room: nothing starves and nothing livelocks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

# Share of the budget that a newcomer must leave free, so that it is not preempted a few decodes later.
WATERMARK = 0.01


class QueueFullError(RuntimeError):
    """The waiting queue is at its bound; the caller should retry later."""


class Schedulable(Protocol):
    """What scheduling needs to know of a sequence."""

    @property
    def num_computed_tokens(self) -> int:
        """Tokens it holds in the KV cache."""

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens to compute until the next one can be sampled; 0 where the last one is on its way."""

    @property
    def max_chunk_tokens(self) -> int:
        """Most of them in one step; at least 1."""


S = TypeVar("S", bound=Schedulable)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one step and the KV cache can take."""

    max_num_seqs: int
    """Most running sequences, and most sequences in one step."""
    max_num_batched_tokens: int
    """Most tokens in one step."""
    kv_total_tokens: int
    """Most tokens in the KV cache."""
    held_seqs: int = 0
    """Places of sequences that ended while a step with them runs: free once it has run."""
    held_tokens: int = 0
    """KV tokens of those."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_num_seqs <= self.max_num_batched_tokens:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} must be at least max_num_seqs="
                f"{self.max_num_seqs}, so that every sequence can decode in each step, and that at least 1"
            )


@dataclass(slots=True)
class Schedule(Generic[S]):
    """The decision. A sequence is in at most one of the three lists."""

    chunks: list[tuple[S, int]] = field(default_factory=list)
    """Sequences of the step with their number of tokens. Those that waited are now running."""
    preempted: list[S] = field(default_factory=list)
    """Running sequences that lose their KV, in order of arrival; they go back to the front of the queue."""
    too_large: list[S] = field(default_factory=list)
    """Sequences that do not fit the KV cache even alone; they must be finished."""


def schedule(waiting: Iterable[S], running: Sequence[S], limits: Limits) -> Schedule[S]:
    """Plan one step. Both queues are in order of arrival; waiting ones hold no KV. Changes nothing."""
    planner = _Planner(running, limits)
    planner.plan_running([sequence for sequence in running if sequence.num_uncomputed_tokens == 1])
    planner.plan_running([sequence for sequence in running if sequence.num_uncomputed_tokens > 1])
    planner.admit(waiting)
    return planner.result()


def check_queue(
    *, num_waiting: int, num_waiting_tokens: int, num_new: int, num_new_tokens: int, max_waiting: int, max_tokens: int
) -> None:
    """Raise QueueFullError when the new sequences do not fit into the waiting queue; an empty queue takes any."""
    if num_waiting == 0:
        return
    if num_waiting + num_new > max_waiting:
        raise QueueFullError(
            f"{num_waiting} sequences wait and {num_new} more exceed max_waiting={max_waiting}; retry later"
        )
    if num_waiting_tokens + num_new_tokens > max_tokens:
        raise QueueFullError(
            f"{num_waiting_tokens} prompt tokens wait and {num_new_tokens} more exceed "
            f"max_waiting_tokens={max_tokens}; retry later"
        )


class _Planner(Generic[S]):
    """Working state of one call of schedule()."""

    def __init__(self, running: Sequence[S], limits: Limits) -> None:
        self.limits = limits
        self.alive = list(running)
        self.alive_ids = {id(sequence) for sequence in running}
        self.chunks: dict[int, tuple[S, int]] = {}
        self.preempted: list[S] = []
        self.too_large: list[S] = []
        self.tokens_left = limits.max_num_batched_tokens
        kv_used = limits.held_tokens + sum(sequence.num_computed_tokens for sequence in running)
        self.kv_left = limits.kv_total_tokens - kv_used

    def plan_running(self, sequences: Iterable[S]) -> None:
        for sequence in sequences:
            if self.tokens_left == 0:
                return
            if id(sequence) in self.alive_ids:
                self._plan_one(sequence)

    def _plan_one(self, sequence: S) -> None:
        while self.kv_left == 0 and self.alive[-1] is not sequence:
            self._preempt_last()
        if self.kv_left > 0:
            self._add(sequence)
        elif len(self.alive) == 1:
            self.too_large.append(self._drop_last())
        elif sequence.num_uncomputed_tokens == 1:
            # A decode that waits for older ones only holds memory which they are about to need.
            self._preempt_last()

    def admit(self, waiting: Iterable[S]) -> None:
        if self.preempted:
            return
        # What running sequences need to reach their next token is theirs already.
        planned = {key: count for key, (_, count) in self.chunks.items()}
        promised = sum(sequence.num_uncomputed_tokens - planned.get(id(sequence), 0) for sequence in self.alive)
        headroom = promised + int(self.limits.kv_total_tokens * WATERMARK)
        for sequence in waiting:
            if sequence.num_uncomputed_tokens > self.limits.kv_total_tokens:
                self.too_large.append(sequence)
                continue
            if len(self.alive) + self.limits.held_seqs >= self.limits.max_num_seqs or self.tokens_left == 0:
                return
            if self.alive and sequence.num_uncomputed_tokens + headroom > self.kv_left:
                return
            self.alive.append(sequence)
            headroom += sequence.num_uncomputed_tokens - self._add(sequence)

    def result(self) -> Schedule[S]:
        self.preempted.reverse()
        return Schedule(chunks=list(self.chunks.values()), preempted=self.preempted, too_large=self.too_large)

    def _add(self, sequence: S) -> int:
        count = min(sequence.num_uncomputed_tokens, sequence.max_chunk_tokens, self.tokens_left, self.kv_left)
        self.chunks[id(sequence)] = (sequence, count)
        self.tokens_left -= count
        self.kv_left -= count
        return count

    def _preempt_last(self) -> None:
        self.preempted.append(self._drop_last())

    def _drop_last(self) -> S:
        """Take the last sequence and its KV out of the running set, and out of the step if it was already in."""
        sequence = self.alive.pop()
        self.alive_ids.remove(id(sequence))
        _, count = self.chunks.pop(id(sequence), (sequence, 0))
        self.tokens_left += count
        self.kv_left += sequence.num_computed_tokens + count
        return sequence
