"""Which sizes get a graph of their own: minimise the expected cost of steps under a budget of graphs.

Pure arithmetic over a histogram of step sizes; exact, by dynamic programming.
"""

from collections.abc import Mapping, Sequence

from xllm_compile.graph_passes.step_cost import DYNAMIC_OVERHEAD, step_cost


def choose_buckets(histogram: Mapping[int, float], max_size: int, max_buckets: int) -> tuple[int, ...]:
    """At most ``max_buckets`` sizes, ascending, the last one ``max_size``.

    histogram: how often a step of each size occurs, sizes in [1, max_size]. A step runs on the smallest bucket that
    holds it or on the dynamic-shape graph, whichever costs less (step_cost); the expected cost is minimal.
    Raises ValueError on an empty budget or sizes out of range.
    """
    if max_buckets < 1:
        raise ValueError(f"max_buckets={max_buckets} must be at least 1")
    outside = [size for size in histogram if not 1 <= size <= max_size]
    if outside:
        raise ValueError(f"step sizes {outside[:3]} are outside [1, {max_size}]")
    sizes = sorted({*histogram, max_size})
    weights = [float(histogram.get(size, 0.0)) for size in sizes]
    segment = _segment_costs(sizes, weights)
    count = len(sizes)
    # best[j]: least cost of sizes[0..j] when sizes[j] is the largest bucket; previous[k][j]: the bucket below it.
    best = [segment[0][j] for j in range(count)]
    previous: list[list[int | None]] = [[None] * count]
    for _ in range(1, min(max_buckets, count)):
        row, below = list(best), list(previous[-1])
        for j in range(1, count):
            for i in range(j):
                total = best[i] + segment[i + 1][j]
                if total < row[j]:
                    row[j], below[j] = total, i
        best = row
        previous.append(below)
    return _trace_back(sizes, previous)


def _segment_costs(sizes: Sequence[int], weights: Sequence[float]) -> list[list[float]]:
    """[i][j]: cost of the steps of sizes[i..j] when sizes[j] is their bucket."""
    table = [[0.0] * len(sizes) for _ in sizes]
    for j, bucket in enumerate(sizes):
        total = 0.0
        for i in range(j, -1, -1):
            total += weights[i] * min(step_cost(bucket), step_cost(sizes[i]) * (1.0 if i == j else DYNAMIC_OVERHEAD))
            table[i][j] = total
    return table


def _trace_back(sizes: Sequence[int], previous: Sequence[Sequence[int | None]]) -> tuple[int, ...]:
    at: int | None = len(sizes) - 1
    chosen = []
    for below in reversed(previous):
        if at is None:
            break
        chosen.append(sizes[at])
        at = below[at]
    return tuple(reversed(chosen))


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
