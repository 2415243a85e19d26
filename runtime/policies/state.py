"""What scheduling decides on, and the decision: plain data."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Queued(Protocol):
    """What says who goes first (policies/order.py). Times are seconds of the engine's clock."""

    @property
    def number(self) -> int:
        """Grows with arrival; unique."""

    @property
    def is_offline(self) -> bool:
        """Runs only where no online sequence wants the place."""

    @property
    def priority(self) -> int:
        """Lower goes first."""

    @property
    def is_begun(self) -> bool:
        """Another instance had it: its client has some of the answer, or has waited for it already."""

    @property
    def first_deadline_s(self) -> float:
        """When the first token is due; infinity without a TTFT target, minus infinity once it is out, and
        for what began elsewhere: it has waited."""

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens to compute until the next one can be sampled; 0 where the last one is on its way."""


class Schedulable(Queued, Protocol):
    """What scheduling needs to know of a sequence."""

    @property
    def next_due_s(self) -> float:
        """When the next token is due by its TPOT target; infinity without one, or before the first token."""

    @property
    def tpot_slo_s(self) -> float | None:
        """Longest time between tokens that was asked for."""

    @property
    def num_computed_tokens(self) -> int:
        """Tokens it holds in the KV cache or, while it waits, would find there."""

    @property
    def num_growth_tokens(self) -> int:
        """Tokens that may enter the KV cache after those, at most."""

    @property
    def max_chunk_tokens(self) -> int:
        """Most tokens in one step; at least 1."""

    @property
    def num_kv_blocks(self) -> int:
        """KV blocks that come free when it gives up its KV: those that no other sequence shares."""

    @property
    def num_unheld_blocks(self) -> int:
        """KV blocks of num_computed_tokens that it has yet to take: while it waits, those that nobody holds."""


Q = TypeVar("Q", bound=Queued)
S = TypeVar("S", bound=Schedulable)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one step can take."""

    max_num_seqs: int
    """Most running sequences, and most sequences in one step."""
    max_num_batched_tokens: int
    """Most tokens in one step."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_num_seqs <= self.max_num_batched_tokens:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} must be at least max_num_seqs="
                f"{self.max_num_seqs}, so that every sequence can decode in each step, and that at least 1; raise the"
                " one or lower the other"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """What the KV cache can take now."""

    num_blocks: int
    """All there are."""
    num_free_blocks: int
    """Those that a sequence could have now, evictable ones included."""
    block_tokens: int = 1
    """Tokens of one KV block."""
    num_held_seqs: int = 0
    """Places that are taken although nothing runs there: of sequences that ended while a step with them runs, whose KV
    is being sent, or for whom they are reserved."""
    num_promised_blocks: int = 0
    """Of the free ones those that newcomers may not have: what is reserved will grow into them."""
    swap_pays: Callable[[int], bool] | None = None
    """Whether so many tokens are sooner copied out and back than computed again; None where nothing can be copied."""

    def blocks(self, num_tokens: int) -> int:
        """Blocks of a sequence of so many tokens."""
        return -(-num_tokens // self.block_tokens)


@dataclass(slots=True)
class Schedule(Generic[S]):
    """The decision. A sequence is in at most one of the lists."""

    chunks: list[tuple[S, int]] = field(default_factory=list)
    """Sequences of the step with their number of tokens. Those that waited are now running."""
    preempted: list[S] = field(default_factory=list)
    """Running sequences that lose their KV, in order of arrival, and wait again to be computed anew."""
    swapped: list[S] = field(default_factory=list)
    """Running sequences whose KV is to be copied out and which wait to have it back."""
    too_large: list[S] = field(default_factory=list)
    """Sequences that do not fit the KV cache even alone; they must be finished."""
    num_held_back: int = 0
    """Running offline sequences that keep their KV and are not in the step, for want of time or memory."""
