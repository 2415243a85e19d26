"""Efficiency factors, and rates, that make the cost model agree with measurements: least squares of log(predicted /
measured)."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

from xllm_compile.graph_passes.cost_model import CostModel, NodeCost
from xllm_compile.graph_passes.device_spec import DeviceSpec, Efficiency

Sample = tuple[NodeCost, float]
"""Work of a call, and the seconds it took."""

_STEPS = (2.0, 1.4, 1.15, 1.05, 1.015)
_BOUNDS = {"compute": (1e-4, 4.0), "memory": (1e-4, 4.0), "half_rows": (0.01, 4096.0), "overlap": (0.01, 1.0)}


def fit_efficiency(spec: DeviceSpec, family: str, samples: Sequence[Sample]) -> Efficiency:
    """The family's factors, all but its tiles, from samples of that family. Raises ValueError without samples.

    Each factor in turn is scaled up and down while the error falls, with ever smaller steps: four smooth factors of few
    samples need no better search.
    """
    chosen = [(cost, seconds) for cost, seconds in samples if cost.family == family]
    if not chosen or min(seconds for _, seconds in chosen) <= 0:
        raise ValueError(f"family {family} needs samples that took some time")
    start = spec.efficiency.get(family, Efficiency())
    # From zero nothing can be scaled.
    start = replace(start, half_rows=max(start.half_rows, 0.1), overlap=max(start.overlap, 0.1))
    names = ["compute", "memory", "overlap"]
    if any(cost.flops_per_row for cost, _ in chosen):
        names.append("half_rows")
    return _descend(start, names, lambda trial: _error(spec, family, trial, chosen))


def fit_rate(spec: DeviceSpec, dtype: str, samples: Sequence[Sample]) -> DeviceSpec:
    """The spec with the cube's rate for ``dtype`` with which the model is right at the median of samples that compute.
    Raises ValueError without samples."""
    if not samples:
        raise ValueError(f"the rate of {dtype} needs samples")
    rate = spec.peak_flops("cube", dtype) / spec.cores["cube"]
    # What is no arithmetic stays as it is: each turn leaves less of the error.
    for _ in range(8):
        rates = {**spec.core_flops, "cube": {**spec.core_flops["cube"], dtype: rate}}
        spec = replace(spec, core_flops=rates)
        model = CostModel(spec=spec)
        rate *= statistics.median(model.seconds(cost) / seconds for cost, seconds in samples)
    return spec


def _descend(best: Efficiency, names: Sequence[str], error: Callable[[Efficiency], float]) -> Efficiency:
    least = error(best)
    for step in _STEPS:
        is_falling = True
        while is_falling:
            is_falling = False
            for name in names:
                for factor in (step, 1 / step):
                    low, high = _BOUNDS[name]
                    trial = replace(best, **{name: min(max(getattr(best, name) * factor, low), high)})
                    found = error(trial)
                    if found < least * (1 - 1e-9):
                        best, least, is_falling = trial, found, True
    return best


def _error(spec: DeviceSpec, family: str, trial: Efficiency, samples: Sequence[Sample]) -> float:
    model = CostModel(spec=replace(spec, efficiency={**spec.efficiency, family: trial}))
    return sum(math.log(model.seconds(cost) / seconds) ** 2 for cost, seconds in samples)
