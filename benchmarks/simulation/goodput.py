"""The highest rate that a service sustains: bisection over runs with fixed seeds."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Goodput:
    """One rate per seed, and every point that was run for it."""

    rates: tuple[float, ...]
    points: tuple[tuple[float, float], ...]
    """(rate, what was measured there), of all seeds, by rate."""

    @property
    def median(self) -> float:
        return statistics.median(self.rates)

    def to_json(self) -> dict[str, Any]:
        return {
            "median": self.median,
            "min": min(self.rates),
            "max": max(self.rates),
            "by_seed": list(self.rates),
            "points": [list(point) for point in self.points],
        }


def highest_rate(
    measure: Callable[[float, int], float],
    is_enough: Callable[[float], bool],
    seeds: Sequence[int],
    *,
    start: float,
    precision: float = 0.02,
) -> Goodput:
    """The highest rate at which ``measure(rate, seed)`` is still enough, to a share of ``precision``; of each seed.

    Up to the first failure the rate doubles from ``start``, or halves down to the first success; 0 below 1/64 of it.
    """
    rates: list[float] = []
    points: list[tuple[float, float]] = []

    for seed in seeds:

        def is_sustained(rate: float, seed: int = seed) -> bool:
            points.append((rate, value := measure(rate, seed)))
            return is_enough(value)

        # Seeds differ by little: begin where the last one ended.
        low, high = 0.0, (rates[-1] * 1.1 if rates and rates[-1] else start)
        while is_sustained(high):
            low, high = high, 1.25 * high if rates else 2 * high
        while low == 0.0 and high > start / 64:
            if is_sustained(high / 1.5):
                low = high / 1.5
            else:
                high /= 1.5
        while low and high / low > 1 + precision:
            middle = (low * high) ** 0.5
            low, high = (middle, high) if is_sustained(middle) else (low, middle)
        rates.append(low)
    return Goodput(rates=tuple(rates), points=tuple(sorted(points)))
