"""The bound of the waiting queue, in sequences and in tokens, and when a refused client should come back."""

from dataclasses import dataclass

# Share of the queue that offline requests may fill: a batch of them must not get online requests refused.
OFFLINE_SHARE = 0.5


class QueueFullError(RuntimeError):
    """The waiting queue is at its bound; the caller should retry after ``retry_after_s``."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueBound:
    max_waiting: int
    """Most sequences."""
    max_tokens: int
    """Most prompt tokens."""
    whose: str = ""
    """Said in refusals, where it is not everybody's."""

    def offline(self) -> "QueueBound":
        """The part that offline requests may fill."""
        return QueueBound(
            max_waiting=max(1, int(self.max_waiting * OFFLINE_SHARE)),
            max_tokens=max(1, int(self.max_tokens * OFFLINE_SHARE)),
            whose=" for offline requests",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceTime:
    """Predicted seconds of the device that waiting work takes."""

    token_s: float
    """To prefill one token."""
    sequence_s: float
    """To decode one sequence, its share of the steps it is in."""

    def drain_s(self, num_seqs: int, num_tokens: int) -> float:
        return max(0, num_tokens) * self.token_s + max(0, num_seqs) * self.sequence_s


def check_queue(
    *,
    num_waiting: int,
    num_waiting_tokens: int,
    num_new: int,
    num_new_tokens: int,
    bound: QueueBound,
    time: ServiceTime,
) -> None:
    """Raise QueueFullError when the new sequences do not fit into the waiting queue; an empty queue takes any.

    The error says how long it takes, as predicted, until enough of the queue is served.
    """
    if num_waiting == 0:
        return
    seqs_over = num_waiting + num_new - bound.max_waiting
    tokens_over = num_waiting_tokens + num_new_tokens - bound.max_tokens
    # What is served to make room has prompts of the queue's mean length.
    mean_tokens = num_waiting_tokens / num_waiting
    num_ahead = min(num_waiting, max(seqs_over, round(tokens_over / max(1.0, mean_tokens))))
    retry_after_s = time.drain_s(num_ahead, round(num_ahead * mean_tokens))
    if seqs_over > 0:
        raise QueueFullError(
            f"{num_waiting} sequences wait and {num_new} more exceed max_waiting={bound.max_waiting}{bound.whose}; "
            "retry later",
            retry_after_s,
        )
    if tokens_over > 0:
        raise QueueFullError(
            f"{num_waiting_tokens} prompt tokens wait and {num_new_tokens} more exceed "
            f"max_waiting_tokens={bound.max_tokens}{bound.whose}; retry later",
            retry_after_s,
        )
