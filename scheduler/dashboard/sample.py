"""From what stands now and what stood before to one sample of the page's history, as JSON."""

import json
from dataclasses import asdict

from xllm_compile.scheduler.cluster.state import InstanceCounters
from xllm_compile.scheduler.dashboard.reading import PERCENTILES, InstanceReading, Reading

INSTANCE_FIELDS = (
    "pool",
    "health",
    "running",
    "decoding",
    "waiting",
    "offline",
    "kv_used",
    "kv_total",
    "ttft_ms",
    "tpot_ms",
    "tokens_per_s",
    "sent_bytes_per_s",
)
"""What the list of each instance in a sample holds, in this order."""


class Sampler:
    def __init__(self) -> None:
        self._last: tuple[float, Reading] | None = None

    def sample(self, reading: Reading, *, now_s: float, wall_s: float) -> bytes:
        """now_s is of a clock that only grows; wall_s, seconds since 1970, is what the page shows."""
        before_s, before = self._last or (now_s, reading)
        self._last = now_s, reading
        # The first sample has no time behind it.
        per_s = 1 / (now_s - before_s) if now_s > before_s else None
        earlier = {(each.name, each.incarnation): each.counters for each in before.instances}
        grown = [_growth(each.counters, earlier.get((each.name, each.incarnation))) for each in reading.instances]
        service: dict[str, float | None] = {"open": reading.num_open}
        for name, seconds in (("ttft_ms", reading.ttft_s), ("tpot_ms", reading.tpot_s)):
            service |= {f"{name}_p{p}": _ms(value) for p, value in zip(PERCENTILES, seconds, strict=True)}
        for name, total in reading.counters.items():
            service[name] = _rate(total - before.counters.get(name, total), per_s)
        for name in asdict(InstanceCounters()):
            service[name] = _rate(sum(each[name] for each in grown), per_s)
        rows = {each.name: _row(each, growth, per_s) for each, growth in zip(reading.instances, grown, strict=True)}
        return json.dumps(
            {"at": round(wall_s, 2), "service": service, "instances": rows}, separators=(",", ":")
        ).encode()


def _growth(now: InstanceCounters, before: InstanceCounters | None) -> dict[str, int]:
    """Nothing for an instance that is new: what it did before is not of this second."""
    earlier = asdict(before or now)
    return {name: max(0, total - earlier[name]) for name, total in asdict(now).items()}


def _row(instance: InstanceReading, growth: dict[str, int], per_s: float | None) -> list[str | float | None]:
    return [
        instance.pool,
        instance.health,
        instance.num_running,
        instance.num_decoding,
        instance.num_waiting,
        instance.num_offline,
        instance.kv_tokens_used,
        instance.kv_tokens_total,
        _ms(instance.ttft_s),
        _ms(instance.tpot_s),
        _rate(growth["num_generated_tokens"], per_s),
        _rate(growth["num_sent_bytes"], per_s),
    ]


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else _rounded(seconds * 1e3)


def _rate(growth: float, per_s: float | None) -> float | None:
    return None if per_s is None else _rounded(growth * per_s)


def _rounded(value: float) -> float:
    """Four digits are more than a chart shows."""
    short = float(f"{value:.4g}")
    return int(short) if short.is_integer() else short
