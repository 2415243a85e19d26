"""Predicted seconds of a step by its size: one table for choosing buckets at build time and among them at run time.

The build fills it from the cost model; the artifact carries it. It covers what grows with the size of a graph. What
attention reads does not: padding attends to nothing, so it is the same whichever graph runs the step.
"""

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTimes:
    """``seconds[i]`` of a step of ``sizes[i]`` rows, sizes ascending; straight lines between."""

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    dynamic_overhead: float
    """Time of the dynamic-shape graph over that of a graph for the very size, at least 1."""

    def __post_init__(self) -> None:
        if not self.sizes or len(self.sizes) != len(self.seconds):
            raise ValueError(f"{len(self.sizes)} sizes and {len(self.seconds)} times: needs as many, at least one")
        if list(self.sizes) != sorted({*self.sizes}) or self.sizes[0] < 1 or self.dynamic_overhead < 1:
            raise ValueError(f"sizes {self.sizes} must ascend from 1 on, dynamic_overhead must be at least 1")

    def of(self, size: int) -> float:
        """Seconds of a graph of ``size`` rows; beyond the table the last slope goes on."""
        if len(self.sizes) == 1:
            return self.seconds[0]
        at = min(max(bisect.bisect_left(self.sizes, size), 1), len(self.sizes) - 1)
        low, high = self.sizes[at - 1], self.sizes[at]
        share = (size - low) / (high - low)
        return self.seconds[at - 1] * (1 - share) + self.seconds[at] * share

    def of_dynamic(self, size: int) -> float:
        """Seconds of the dynamic-shape graph on ``size`` rows."""
        return self.of(size) * self.dynamic_overhead

    def padding_pays(self, size: int, bucket: int) -> bool:
        """Whether a step of ``size`` runs on the graph of ``bucket`` no slower than on the dynamic-shape graph."""
        return self.of(bucket) <= self.of_dynamic(size)

    def bucket_for(self, size: int, buckets: Sequence[int]) -> int | None:
        """The bucket whose graph runs a step of ``size``; None where the dynamic-shape graph does. buckets ascend."""
        at = bisect.bisect_left(buckets, size)
        return buckets[at] if at < len(buckets) and self.padding_pays(size, buckets[at]) else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "StepTimes":
        return cls(**{**values, "sizes": tuple(values["sizes"]), "seconds": tuple(values["seconds"])})


def table_sizes(largest: int) -> tuple[int, ...]:
    """Sizes worth an entry: every small one, because kernels work in blocks of rows, then ever wider apart."""
    sizes = {*range(1, min(largest, 64) + 1), largest}
    size = 64
    while size < largest:
        sizes.add(size)
        size += 16 if size < 512 else size // 16
    return tuple(sorted(sizes))


def tabulate(seconds: Callable[[int], float], largest: int, dynamic_overhead: float) -> StepTimes:
    """The table of a function of the size, up to ``largest``."""
    sizes = table_sizes(largest)
    return StepTimes(sizes=sizes, seconds=tuple(map(seconds, sizes)), dynamic_overhead=dynamic_overhead)
