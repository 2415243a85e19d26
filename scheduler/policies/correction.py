"""How far predictions are off on an instance, learnt from what happened.

Profiles know steps, not the rest: the way there, other gateways' requests, prefixes that were evicted. The ratio is of
sums, so long waits count for what they are, and forgets.
"""

from dataclasses import dataclass, field

from xllm_compile.scheduler.cluster.state import InstanceInfo

_FORGETTING = 0.95
# What is believed before anything happened weighs so many seconds.
_PRIOR_S = 0.1
_LEAST, _MOST = 0.25, 4.0


@dataclass(slots=True)
class Correction:
    """Of TTFT, for all instances. A restarted instance starts anew."""

    _sums: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    """Seconds that were predicted, and that it took."""

    def observe(
        self, info: InstanceInfo, predicted_s: float, actual_s: float, *, ttft_slo_s: float | None = None
    ) -> None:
        """predicted_s: uncorrected (Placement.ttft_s).

        What misses its target waits for others that can keep theirs. Beyond the target both times say that it is late,
        and no more: how long it waits then is a matter of who else is late, and of who comes later.
        """
        if ttft_slo_s is not None:
            predicted_s, actual_s = min(predicted_s, ttft_slo_s), min(actual_s, ttft_slo_s)
        predicted, actual = self._sums.get((info.name, info.incarnation), (0.0, 0.0))
        self._sums[info.name, info.incarnation] = (
            _FORGETTING * predicted + predicted_s,
            _FORGETTING * actual + actual_s,
        )

    def ratio(self, info: InstanceInfo) -> float:
        """What it takes over what is predicted, between a quarter and four times."""
        predicted, actual = self._sums.get((info.name, info.incarnation), (0.0, 0.0))
        return min(_MOST, max(_LEAST, (actual + _PRIOR_S) / (predicted + _PRIOR_S)))

    def gone(self, info: InstanceInfo) -> None:
        self._sums.pop((info.name, info.incarnation), None)
