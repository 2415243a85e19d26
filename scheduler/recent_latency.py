"""What first tokens and the gaps between tokens took lately: what an instance reports of itself."""

from collections import deque

from xllm_compile.runtime.outputs import RequestOutput

WINDOW_S = 10.0


class RecentMean:
    """Of values in the last WINDOW_S, in sums of a second each. Belongs to one thread."""

    def __init__(self) -> None:
        self._seconds: deque[list[float]] = deque()
        """[second, sum, count] of each, the oldest first."""

    def add(self, now_s: float, total: float, count: int = 1) -> None:
        """count values that add up to total."""
        second = float(int(now_s))
        if not self._seconds or self._seconds[-1][0] < second:
            self._seconds.append([second, 0.0, 0.0])
        self._seconds[-1][1] += total
        self._seconds[-1][2] += count
        self._drop(now_s)

    def mean(self, now_s: float) -> float | None:
        """None where there was nothing."""
        self._drop(now_s)
        count = sum(each[2] for each in self._seconds)
        return sum(each[1] for each in self._seconds) / count if count else None

    def _drop(self, now_s: float) -> None:
        while self._seconds and self._seconds[0][0] + WINDOW_S < now_s:
            self._seconds.popleft()


class RecentLatency:
    """Of all requests of a service. Times are seconds of the engine's clock."""

    def __init__(self) -> None:
        self._ttft = RecentMean()
        self._tpot = RecentMean()

    def observe(self, output: RequestOutput, last_s: float | None, num_tokens: int) -> float | None:
        """An output of one request with num_tokens new ones, where the one before had its token at last_s.

        Returns the time of its newest token.
        """
        metrics = output.metrics
        newest_s = metrics.last_token_s
        if newest_s is None or num_tokens == 0:
            return last_s
        if last_s is None and metrics.first_token_s is not None:
            if not metrics.is_resumed:
                self._ttft.add(newest_s, metrics.first_token_s - metrics.arrival_s)
            last_s, num_tokens = metrics.first_token_s, num_tokens - 1
        if last_s is not None and num_tokens > 0:
            # Completions of one request take their steps side by side.
            self._tpot.add(newest_s, (newest_s - last_s) * len(output.outputs), num_tokens)
        return newest_s

    def means(self, now_s: float) -> tuple[float | None, float | None]:
        """Of times to the first token and of times between tokens."""
        return self._ttft.mean(now_s), self._tpot.mean(now_s)
