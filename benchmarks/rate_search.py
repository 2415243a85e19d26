"""The highest rate at which enough requests are served well, where each try costs real time: few tries, then a line."""

import math
from collections.abc import Callable, Mapping

_STEP = 1.25
"""From one rate to the next, until one is too high and one is not."""


def bracket(measure: Callable[[float], float], enough: float, *, start: float, max_tries: int) -> None:
    """Measure at rates around that at which the share falls below enough: by steps until it lies between two, then
    between those. measure: from a rate to the share of requests that were served well. max_tries: while it lies beyond
    all rates tried, up to twice as many."""
    low, high, rate = 0.0, math.inf, start
    for num_tried in range(2 * max_tries):
        if num_tried >= max_tries and low > 0.0 and high < math.inf:
            return
        if measure(rate) >= enough:
            low = rate
        else:
            high = rate
        if high == math.inf:
            rate = low * _STEP
        elif low == 0.0:
            rate = high / _STEP
        else:
            rate = math.sqrt(low * high)


def crossing(points: Mapping[float, float], enough: float) -> float:
    """The rate at which the share falls to enough, on the line between the two rates around it; the last one tried
    where it does not, and in proportion below the first where nothing was enough."""
    tried = sorted(points)
    falls = [rate for rate in tried if points[rate] < enough]
    if not falls:
        return tried[-1]
    high = falls[0]
    below = [rate for rate in tried if rate < high]
    if not below:
        return high * points[high] / enough
    low = below[-1]
    return low + (high - low) * (points[low] - enough) / (points[low] - points[high])
