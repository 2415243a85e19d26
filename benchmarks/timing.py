"""How things are timed: warm-up, repeats, and A/B in turns, because a shared machine's speed wanders."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Statistics of repeated measurements; ``values`` in the order they were taken."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("a summary needs at least one value")

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def min(self) -> float:
        return min(self.values)

    @property
    def max(self) -> float:
        return max(self.values)

    @property
    def p99(self) -> float:
        return percentile(self.values, 99)

    def to_json(self) -> dict[str, Any]:
        return {
            "median": _rounded(self.median),
            "min": _rounded(self.min),
            "max": _rounded(self.max),
            "p99": _rounded(self.p99),
            "values": [_rounded(value) for value in self.values],
        }


def summarise(values: Sequence[float]) -> Summary:
    return Summary(values=tuple(values))


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest ranks, as numpy's default. Raises ValueError without values."""
    if not values:
        raise ValueError("a percentile needs at least one value")
    if not 0 <= percent <= 100:
        raise ValueError(f"percent={percent} must be in [0, 100]")
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    low, high = math.floor(at), math.ceil(at)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def measure(
    run: Callable[[], object], *, warmup: int = 1, repeats: int = 5, clock: Clock = time.perf_counter
) -> Summary:
    """Seconds of each of ``repeats`` calls, after ``warmup`` calls that do not count."""
    (summary,) = measure_in_turns({"": run}, warmup=warmup, repeats=repeats, clock=clock).values()
    return summary


def measure_in_turns(
    runs: Mapping[str, Callable[[], object]],
    *,
    warmup: int = 1,
    repeats: int = 5,
    clock: Clock = time.perf_counter,
) -> dict[str, Summary]:
    """Seconds of each call, one call of each in every round: A B, B A, A B, ... so that drift hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(-warmup, repeats):
        names = list(runs)[:: 1 if index % 2 == 0 else -1]
        for name in names:
            began = clock()
            runs[name]()
            taken = clock() - began
            if index >= 0:
                seconds[name].append(taken)
    return {name: summarise(values) for name, values in seconds.items()}


def _rounded(value: float) -> float:
    """Six significant digits: more is noise, and records stay readable."""
    return float(f"{value:.6g}")
