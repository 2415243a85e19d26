"""What may be asked of the quantise pass. No torch here: command lines read it."""

from dataclasses import dataclass

SCHEMES = ("int8", "int4", "int8-dynamic", "int4-dynamic")
GROUP_SIZES = (32, 128)


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantisation:
    """How the products of a model are quantised. Raises ValueError, naming field and limit, on a bad value."""

    scheme: str
    """int8 and int4 round weights only; with -dynamic activations are rounded to int8 too, one scale per token. none
    leaves the layers as the checkpoint has them, and is for has_head."""
    group_size: int | None = None
    """int4: elements along the reduction axis that share a scale, 32 where it is not given. 4.5 bits a weight at 32,
    4.125 at 128."""
    has_head: bool = False
    """Quantise the head too, as int8 in every scheme, and with it the embedding that shares its weight."""
    stored_by: str = ""
    """The method of a checkpoint whose layers are quantised already, and are taken as they are; groups may be of any
    multiple of 8 then, or the whole row (0), and have zero points. None is int8 with a scale per row and without."""

    def __post_init__(self) -> None:
        if self.stored_by:
            return
        if self.scheme not in SCHEMES and not (self.scheme == "none" and self.has_head):
            raise ValueError(f"quantize={self.scheme!r} is not supported; supported: {', '.join(SCHEMES)}")
        if self.group_size is None and self.weight_kind == "int4":
            object.__setattr__(self, "group_size", GROUP_SIZES[0])
        elif self.group_size is not None and self.weight_kind != "int4":
            raise ValueError(
                f"quantize-group={self.group_size} is for int4 and int4-dynamic only; {self.scheme} has a scale per"
                " channel"
            )
        if self.group_size not in (None, *GROUP_SIZES):
            raise ValueError(f"quantize-group={self.group_size} is not supported; supported: 32, 128")

    @property
    def weight_kind(self) -> str:
        """int8 or int4."""
        return self.scheme.removesuffix("-dynamic")

    @property
    def label(self) -> str:
        """As the manifest names it: int8, int4-g32, int8-dynamic+head, int4-g128 (awq)."""
        group = f"-g{self.group_size}" if self.group_size else ""
        stored = f" ({self.stored_by})" if self.stored_by else ""
        return self.scheme + group + ("+head" if self.has_head else "") + stored
