"""Which sizes get a graph of their own: minimise the expected time of steps under a budget of graphs.

Pure arithmetic over a histogram of step sizes; exact, by dynamic programming.
"""

import bisect
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from xllm_compile.graph_passes.step_cost import StepTimes

# What a padded row counts for at least, in average rows: where memory is the limit the prediction calls rows free, and
# it cannot be that sure. On the Azure conversation trace at 512 tokens a step it takes a tenth off the padding and
# adds 0.01% to the predicted time; at 2048 it changes neither.
PADDED_ROW = 0.1
# Sizes the program chooses among; beyond it neighbouring sizes share one candidate.
_MAX_CANDIDATES = 2048


def choose_buckets(
    histogram: Mapping[int, float], max_size: int, max_buckets: int, times: StepTimes
) -> tuple[int, ...]:
    """At most ``max_buckets`` sizes, ascending, the last one ``max_size``.

    histogram: how often a step of each size occurs, sizes in [1, max_size]. A step runs on the smallest bucket that
    holds it or on the dynamic-shape graph, whichever takes less by ``times``, a padded row counting PADDED_ROW more;
    the expected time is minimal (beyond 2048 different sizes: among multiples of max_size / 2048, rounded up).
    Raises ValueError on an empty budget or sizes out of range.
    """
    if max_buckets < 1:
        raise ValueError(f"max_buckets={max_buckets} must be at least 1")
    outside = [size for size in histogram if not 1 <= size <= max_size]
    if outside:
        raise ValueError(f"step sizes {outside[:3]} are outside [1, {max_size}]")
    if len(histogram) >= _MAX_CANDIDATES:
        histogram = _coarse(histogram, max_size)
    sizes = sorted({*histogram, max_size})
    segment = _segment_seconds(sizes, [float(histogram.get(size, 0.0)) for size in sizes], times)
    # best[j]: least time of sizes[0..j] when sizes[j] is the largest bucket; previous[k][j]: the bucket below it.
    best = segment[0].copy()
    previous = [np.full(len(sizes), -1)]
    for _ in range(1, min(max_buckets, len(sizes))):
        row, below = best.copy(), previous[-1].copy()
        for j in range(1, len(sizes)):
            totals = best[:j] + segment[1 : j + 1, j]
            i = int(totals.argmin())
            if totals[i] < row[j]:
                row[j], below[j] = totals[i], i
        best = row
        previous.append(below)
    return _trace_back(sizes, previous)


def _coarse(histogram: Mapping[int, float], max_size: int) -> dict[int, float]:
    grain = -(-max_size // _MAX_CANDIDATES)
    found: dict[int, float] = {}
    for size, weight in histogram.items():
        top = min(-(-size // grain) * grain, max_size)
        found[top] = found.get(top, 0.0) + weight
    return found


def _segment_seconds(sizes: Sequence[int], weights: Sequence[float], times: StepTimes) -> npt.NDArray[np.float64]:
    """[i, j]: seconds of the steps of sizes[i..j] when sizes[j] is their bucket."""
    exact = np.array([times.of(size) for size in sizes])
    dynamic = np.array([times.of_dynamic(size) for size in sizes])
    rows = np.array(sizes)
    average_row = (exact[-1] - times.of(1)) / max(1, sizes[-1] - 1)
    padded = exact[None, :] + PADDED_ROW * average_row * (rows[None, :] - rows[:, None])
    each = np.array(weights)[:, None] * np.minimum(padded, dynamic[:, None])
    np.fill_diagonal(each, np.array(weights) * exact)
    # From each i up to j: sums from below, of the part above the diagonal.
    return np.cumsum(np.triu(each)[::-1], axis=0)[::-1]


def _trace_back(sizes: Sequence[int], previous: Sequence[npt.NDArray[np.int64]]) -> tuple[int, ...]:
    at = len(sizes) - 1
    chosen = []
    for below in reversed(previous):
        if at < 0:
            break
        chosen.append(sizes[at])
        at = int(below[at])
    return tuple(reversed(chosen))


def padded_tokens(histogram: Mapping[int, float], buckets: Sequence[int], times: StepTimes | None = None) -> float:
    """Rows computed for nothing when every step runs on the smallest bucket that holds it.

    With ``times``, steps that the dynamic-shape graph serves faster run there, without padding.
    """
    ascending = sorted(buckets)
    total = 0.0
    for size, weight in histogram.items():
        bucket = ascending[bisect.bisect_left(ascending, size)]
        if times is None or times.padding_pays(size, bucket):
            total += weight * (bucket - size)
    return total


def default_histogram(max_size: int) -> dict[int, float]:
    """Steps of a server under light to medium load, per prompt: some twenty decode steps in batches (fewer the
    larger), a full prefill chunk, and a remainder of any length."""
    largest_batch = min(max_size, 64)
    share = sum(1.0 / size for size in range(1, largest_batch + 1))
    histogram = {size: 20.0 / size / share for size in range(1, largest_batch + 1)}
    remainders = range(largest_batch + 16, max_size, 16)
    for size in remainders:
        histogram[size] = 1.0 / len(remainders)
    histogram[max_size] = histogram.get(max_size, 0.0) + 1.0
    return histogram


def workload_histogram(requests: Sequence[tuple[int, int]], max_size: int) -> dict[int, float]:
    """Steps that (prompt tokens, output tokens) pairs cause: full chunks, remainders, and decode batches.

    Decode batch sizes are not in a list of requests; outputs are spread over them as in the default.
    """
    histogram: dict[int, float] = {}
    decode = {size: 1.0 / size for size in range(1, min(max_size, 64) + 1)}
    share = sum(decode.values())
    for prompt, output in requests:
        for size, times in ((max_size, prompt // max_size), (prompt % max_size, 1)):
            if size and times:
                histogram[size] = histogram.get(size, 0.0) + times
        for size, weight in decode.items():
            # A batch of n serves n tokens in one step.
            histogram[size] = histogram.get(size, 0.0) + output * weight / share / size
    return histogram
