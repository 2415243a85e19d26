"""How many lines are under way: enough to fill the engine, and few enough that it refuses none."""

MAX_IN_FLIGHT = 1024
_AT_FIRST = 8


class InFlightLimit:
    """Additive increase, multiplicative decrease, as TCP finds what a path carries.

    It grows by one with each line that ends while all places are taken and nothing waits in the engine: doubling per
    round. A refusal halves it, once for all lines that were under way together, and nothing starts before the refusal's
    Retry-After. One line is always allowed, so a busy server delays a batch and never fails it. `now` is of any
    monotonic clock, in seconds.
    """

    def __init__(self, max_lines: int = MAX_IN_FLIGHT) -> None:
        self.max_lines = max_lines
        self.limit = min(_AT_FIRST, max_lines)
        self.num_running = 0
        self.held_until_s = 0.0
        self._reduced_at_s = float("-inf")
        self._is_full = False
        """More lines would have started, had there been places."""

    def may_start(self, now_s: float) -> bool:
        """Asked when there is a line to start."""
        self._is_full = self.num_running >= self.limit
        return not self._is_full and now_s >= self.held_until_s

    def started(self) -> None:
        self.num_running += 1

    def ended(self, *, num_waiting: int) -> None:
        """num_waiting: sequences that wait in the engine."""
        if self._is_full and num_waiting == 0:
            self.limit = min(self.limit + 1, self.max_lines)
        self.num_running -= 1

    def stopped(self) -> None:
        """The line was cancelled."""
        self.num_running -= 1

    def refused(self, *, started_s: float, now_s: float, retry_after_s: float) -> None:
        self.num_running -= 1
        self.held_until_s = max(self.held_until_s, now_s + retry_after_s)
        if started_s > self._reduced_at_s:
            self.limit = max(1, self.limit // 2)
            self._reduced_at_s = now_s
