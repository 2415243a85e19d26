"""How long KV takes from one instance to another, learnt from what it took.

Of each pair of machines a line, seconds over bytes, by least squares: a latency and a speed. What is believed before
anything was copied counts as two copies, a small one and a large one. Old copies count less and less, so that a way
which was slow once is tried again.
"""

from dataclasses import dataclass, field

from xllm_compile.scheduler.cluster.state import InstanceInfo

_HALF_LIFE_S = 60.0
# Nothing that was learnt so long ago counts.
_FORGOTTEN_S = 20 * _HALF_LIFE_S
# What one more copy leaves of the weight of those before.
_DECAY = 0.9
_LARGE_BYTES = 64 << 20
# Of each of the prior's two copies, beside 1 for one that was made just now.
_PRIOR_WEIGHT = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyPrior:
    """What is believed at first: rather too much than too little, as a way that is not tried teaches nothing."""

    latency_s: float = 0.005
    """Of the messages and of the wait for a step's end on both sides."""
    bytes_per_s: float = 25e9


@dataclass(slots=True)
class _Line:
    """Weighted sums over copies of x GB and y seconds."""

    at_s: float
    num: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, x: float, y: float, weight: float = 1.0) -> None:
        self.num += weight
        self.x += weight * x
        self.y += weight * y
        self.xx += weight * x * x
        self.xy += weight * x * y

    def scaled(self, factor: float, now: float) -> "_Line":
        return _Line(now, factor * self.num, factor * self.x, factor * self.y, factor * self.xx, factor * self.xy)

    def seconds(self, x: float) -> float:
        slope = (self.num * self.xy - self.x * self.y) / (self.num * self.xx - self.x * self.x)
        if slope < 0:
            # Larger copies were no slower: what they have in common decides.
            return self.y / self.num
        return max(0.0, (self.y - slope * self.x) / self.num) + slope * x


@dataclass(slots=True)
class CopyTimes:
    """Times are seconds of one clock, the caller's."""

    prior: CopyPrior = field(default_factory=CopyPrior)
    _lines: dict[tuple[str, str], _Line] = field(default_factory=dict)
    """By the machines of sender and receiver: instances of one share its ways."""

    def observe(self, source: InstanceInfo, target: InstanceInfo, num_tokens: int, seconds: float, now: float) -> None:
        """A copy took so long, or was given up after it."""
        self._lines = {key: line for key, line in self._lines.items() if now - line.at_s < _FORGOTTEN_S}
        line = self._line(source, target, now).scaled(_DECAY, now)
        line.add(num_tokens * source.kv_bytes_per_token / 1e9, seconds)
        self._lines[source.host, target.host] = line

    def seconds(self, source: InstanceInfo, target: InstanceInfo, num_tokens: int, now: float) -> float:
        """That a copy of so many tokens will take."""
        line = self._line(source, target, now).scaled(1.0, now)
        for num_bytes in (0, _LARGE_BYTES):
            line.add(num_bytes / 1e9, self.prior.latency_s + num_bytes / self.prior.bytes_per_s, _PRIOR_WEIGHT)
        return line.seconds(num_tokens * source.kv_bytes_per_token / 1e9)

    def _line(self, source: InstanceInfo, target: InstanceInfo, now: float) -> _Line:
        line = self._lines.get((source.host, target.host))
        if line is None:
            return _Line(now)
        return line.scaled(0.5 ** ((now - line.at_s) / _HALF_LIFE_S), now)
