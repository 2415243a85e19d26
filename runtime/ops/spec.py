"""What one tensor of a region looks like: shared by model definitions, passes and the artifact."""

from dataclasses import dataclass

TP_GROUP = "tp"
"""Name under which the ranks of one instance register their process group; compiled graphs look it up."""

SPLIT_SUFFIX = ".split"
"""Added to the name of a region that runs on the two halves of a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """Name, shape and dtype of a region's input.

    ``shape`` mixes sizes and symbols (T, S, R, ... as in runtime/ops). ``dtype`` is torch's name for it ("int32").
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """The part of a tensor that a tensor-parallel rank holds: the tensor is cut into ``num_parts`` along ``axis``, and
    ``num_replicas`` neighbouring ranks share each part. It is the same on every rank, and so is what depends on it."""

    axis: int
    num_parts: int
    num_replicas: int = 1

    def rows(self, rank: int, size: int) -> tuple[int, int]:
        """Begin and end, along ``axis``, of the part of ``rank`` in a tensor of ``size`` there."""
        length = size // self.num_parts
        begin = rank // self.num_replicas * length
        return begin, begin + length


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSpec:
    """A weight as a graph wants it: sources, or a rank's shard of each, concatenated along axis 0, then quantised, then
    packed where ``is_packed``.

    Names hold ``{layer}`` where the layer number goes. ``shape`` and ``dtype`` are the final ones.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    is_packed: bool = False
    shards: tuple[Shard | None, ...] = ()
    """Of each source, the part a rank holds; None, or no entry at all, is the whole source."""
    quantised: str = ""
    """What of the quantised sources this is: "int8" or "int4" values, their ".scale" or ".zero"; "" is the plain
    weight."""
    group_size: int = 0
    """Elements along the reduction axis that share a scale; 0 is all of them."""

    @property
    def source_shards(self) -> tuple[Shard | None, ...]:
        """One entry per source."""
        return self.shards or (None,) * len(self.sources)
