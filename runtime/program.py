"""A region after the passes, as text: what is compiled, what the artifact keeps, and what eager mode runs.

The text is the Python that torch.fx prints for the graph. It names operators only (``torch.ops``), so it is
readable, comparable between builds, the stable part of a compiled graph's cache key, and runnable as it is.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor

import xllm_compile.runtime.ops  # noqa: F401  (registers torch.ops.xllm)
from xllm_compile.runtime.ops.spec import Shard, TensorSpec, WeightSpec

ProgramFunction = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionProgram:
    """Arguments of the function in ``code`` are the inputs, in order, then the weights, in order."""

    name: str
    code: str
    inputs: tuple[TensorSpec, ...]
    weights: tuple[WeightSpec, ...]
    layers: tuple[int, ...]
    """Layers that run it, after the programs before it that name them too; empty for embed and head."""
    is_piece: bool = False
    """One of the pieces a region was cut into."""
    is_eager: bool = False
    """Never compiled: runs operator by operator between compiled pieces."""

    @property
    def has_collectives(self) -> bool:
        """Whether it meets the other ranks while it runs."""
        return "_c10d_functional" in self.code

    def load(self) -> ProgramFunction:
        """The function itself, running operator by operator."""
        scope: dict[str, Any] = {"torch": torch, "inf": math.inf, "nan": math.nan, "device": torch.device}
        exec(compile(self.code, f"<region {self.name}>", "exec"), scope)
        forward = scope["forward"]
        return lambda *args: forward(None, *args)

    def content_hash(self) -> str:
        """Covers code and specs; nothing else."""
        values = {key: value for key, value in asdict(self).items() if key in ("name", "code", "inputs", "weights")}
        return xxhash.xxh3_128(repr(sorted(values.items())).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "RegionProgram":
        return cls(
            name=values["name"],
            code=values["code"],
            inputs=tuple(TensorSpec(**{**v, "shape": tuple(v["shape"])}) for v in values["inputs"]),
            weights=tuple(_weight_spec(v) for v in values["weights"]),
            layers=tuple(values["layers"]),
            is_piece=values["is_piece"],
            is_eager=values["is_eager"],
        )


def _weight_spec(values: Mapping[str, Any]) -> WeightSpec:
    shards = tuple(None if shard is None else Shard(**shard) for shard in values["shards"])
    lists = {"shape": tuple(values["shape"]), "sources": tuple(values["sources"]), "shards": shards}
    return WeightSpec(**{**values, **lists})


def concrete_shape(spec: TensorSpec, sizes: Mapping[str, int]) -> Sequence[int]:
    """spec.shape with its symbols replaced."""
    return [size if isinstance(size, int) else sizes[size] for size in spec.shape]
