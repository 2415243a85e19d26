"""What one tensor of a region looks like: shared by model definitions, passes and the artifact."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """Name, shape and dtype of a region's input.

    ``shape`` mixes sizes and symbols (T, S, R, ... as in runtime/ops). ``dtype`` is torch's name for it ("int32").
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSpec:
    """A weight as a graph wants it: sources concatenated along axis 0, then packed where ``is_packed``.

    Names hold ``{layer}`` where the layer number goes. ``shape`` is the final one, packed where it is packed.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    is_packed: bool = False
