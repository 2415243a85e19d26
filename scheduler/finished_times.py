"""What finished requests took lately, for percentiles; histograms of /metrics have all of them, in buckets."""

import math
from collections import deque
from collections.abc import Iterable, Sequence

WINDOW_S = 30.0
MAX_TIMES = 4096
"""Where more finish within the window the last ones count."""


class FinishedTimes:
    """Seconds of one kind. Belongs to one thread."""

    def __init__(self) -> None:
        self._times: deque[tuple[float, float]] = deque(maxlen=MAX_TIMES)
        """(when, seconds), the oldest first."""

    def add(self, now_s: float, seconds: float) -> None:
        self._times.append((now_s, seconds))

    def recent(self, now_s: float) -> list[float]:
        while self._times and self._times[0][0] + WINDOW_S < now_s:
            self._times.popleft()
        return [seconds for _, seconds in self._times]


def percentiles(values: Iterable[float], wanted: Sequence[float]) -> list[float | None]:
    """By nearest rank, wanted from 0 to 100; None each where there is no value."""
    ordered = sorted(values)
    if not ordered:
        return [None] * len(wanted)
    return [ordered[max(0, math.ceil(each / 100 * len(ordered)) - 1)] for each in wanted]
