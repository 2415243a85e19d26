"""Seconds from work: what a node moves and computes, over what a device spec says the device can do.

Pure arithmetic without torch: passes, bucket choice, timelines, the runtime's predictors and simulators share it.
``node_cost.py`` says what a node of a graph costs.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from xllm_compile.graph_passes.device_spec import DeviceSpec, Efficiency, Unit

_DEFAULT = Efficiency()


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeCost:
    """Work of one operator call."""

    unit: Unit
    family: str
    """Of device_spec.FAMILIES: which efficiency applies."""
    dtype: str = "float32"
    """What the products are computed in ("bfloat16")."""
    flops: float = 0.0
    flops_per_row: float = 0.0
    """flops of one row, summed over the parts that are computed one by one; 0: flops do not come in rows."""
    outputs: tuple[int, int, int] = (0, 0, 0)
    """Products, rows and columns of each: what is dealt to cores in tiles; zeros where work divides evenly."""
    bytes_read: float = 0.0
    bytes_written: float = 0.0
    bytes_cold: float = 0.0
    """Part of bytes_read that no earlier node brought near: weights and the KV cache."""
    bytes_link: float = 0.0
    """What this device sends."""
    messages: int = 0
    """One after the other, on the link."""
    sends_while_computing: bool = False
    """Whether the link is at work during the rest of the call."""
    launches: int = 1

    @property
    def bytes_moved(self) -> float:
        return self.bytes_read + self.bytes_written


@dataclass(frozen=True, kw_only=True, slots=True)
class CostModel:
    spec: DeviceSpec

    def seconds(self, cost: NodeCost, share: float = 1.0) -> float:
        """Time of one call on ``share`` of its unit's cores, in (0, 1]. Rates are proportional to the cores at work."""
        if not 0 < share <= 1:
            raise ValueError(f"share={share} of a unit must be in (0, 1]")
        at_work = self.at_work(cost, share)
        compute, memory = self.compute_seconds(cost) / at_work, self.memory_seconds(cost) / share
        # Cores without a tile may read for the others along the inner axis, unless each reads for itself alone.
        if self.spec.core_bytes_per_s is not None and cost.unit in ("cube", "vector"):
            num_reading = at_work * self.spec.cores[cost.unit]
            memory = max(memory, cost.bytes_cold / (num_reading * self.spec.core_bytes_per_s))
        hidden = self._efficiency(cost).overlap * min(compute, memory)
        work, link = compute + memory - hidden, self.link_seconds(cost)
        if cost.sends_while_computing:
            link = max(0.0, link - work)
        return cost.launches * self.spec.launch_s + link + work

    def compute_seconds(self, cost: NodeCost) -> float:
        """Of the arithmetic alone, on all cores."""
        if not cost.flops or cost.unit not in ("cube", "vector"):
            return 0.0
        how = self._efficiency(cost)
        flops = cost.flops
        if cost.flops_per_row:
            rows = cost.flops / cost.flops_per_row
            # Rounding guards against 16.000000001 rows taking two tiles.
            tiled = math.ceil(round(rows / how.row_tile, 9)) * how.row_tile
            flops = cost.flops_per_row * (tiled + how.half_rows)
        return flops / (self.spec.peak_flops(cost.unit, cost.dtype) * how.compute)

    def memory_seconds(self, cost: NodeCost) -> float:
        """Of moving data alone: what is cold from memory, what earlier nodes made from the cache if it fits there."""
        spec, how = self.spec, self._efficiency(cost)
        warm = max(0.0, cost.bytes_moved - cost.bytes_cold)
        warm_rate = spec.cache_bytes_per_s if warm <= spec.cache_bytes else spec.memory_bytes_per_s
        return (cost.bytes_cold / spec.memory_bytes_per_s + warm / warm_rate) / how.memory

    def link_seconds(self, cost: NodeCost) -> float:
        how = self.spec.efficiency.get("collective", _DEFAULT)
        return cost.messages * self.spec.link_latency_s + cost.bytes_link / (self.spec.link_bytes_per_s * how.memory)

    def at_work(self, cost: NodeCost, share: float = 1.0) -> float:
        """The share of its unit's cores that finds work, on average, of the ``share`` it is given: tiles are dealt in
        rounds, and the last may be short."""
        how = self._efficiency(cost)
        products, rows, columns = cost.outputs
        if not how.tile_rows or not products:
            return share
        tiles = products * -(-rows // how.tile_rows) * -(-columns // how.tile_columns)
        cores = self.spec.cores[cost.unit]
        rounds = math.ceil(tiles / max(1, round(share * cores)))
        return tiles / rounds / cores

    def total_seconds(self, costs: Iterable[NodeCost]) -> float:
        """One after the other."""
        return sum(self.seconds(cost) for cost in costs)

    def _efficiency(self, cost: NodeCost) -> Efficiency:
        return self.spec.efficiency.get(cost.family, _DEFAULT)
