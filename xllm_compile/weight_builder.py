"""From checkpoint tensors to the weights file of an artifact: concatenate, convert, quantise, pack, stream to disk."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from xllm_compile.models import stored_quantisation
from xllm_compile.models.checkpoint import Checkpoint
from xllm_compile.models.stored_quantisation import StoredMatrix, StoredQuantisation, is_stored
from xllm_compile.runtime.ops import quantised
from xllm_compile.runtime.ops.reference import pack_weight
from xllm_compile.runtime.ops.spec import Shard, WeightSpec
from xllm_compile.runtime.program import RegionProgram
from xllm_compile.runtime.weights import write_weights


def artifact_weights(programs: Sequence[RegionProgram]) -> list[WeightSpec]:
    """Every weight of the artifact with its layer number filled in; one that two regions share is there once."""
    specs: dict[str, WeightSpec] = {}
    for program in programs:
        for layer in program.layers or (0,):
            for template in program.weights:
                spec = replace(
                    template,
                    name=template.name.format(layer=layer),
                    sources=tuple(source.format(layer=layer) for source in template.sources),
                )
                if specs.setdefault(spec.name, spec) != spec:
                    raise AssertionError(f"regions disagree on weight {spec.name}: {specs[spec.name]} and {spec}")
    return list(specs.values())


def weights_key(
    checkpoint_hash: str,
    specs: Sequence[WeightSpec],
    computed: Mapping[str, Tensor],
    stored: StoredQuantisation | None = None,
) -> str:
    """Equal keys mean equal weights files, of every rank."""
    digest = xxhash.xxh3_128(repr((checkpoint_hash, sorted(map(repr, specs)), stored)).encode())
    if any(spec.quantised for spec in specs):
        # How a weight is rounded, or read, is in no spec.
        for source in (quantised.__file__, stored_quantisation.__file__):
            digest.update(Path(str(source)).read_bytes())
    for name in sorted(computed):
        digest.update(name.encode() + computed[name].numpy().tobytes())
    return digest.hexdigest()


def build_weights(
    path: Path,
    checkpoint: Checkpoint,
    computed: Mapping[str, Tensor],
    specs: Sequence[WeightSpec],
    on_tensor: Callable[[int], None],
    rank: int = 0,
    stored: StoredQuantisation | None = None,
) -> None:
    """Write the weights file of a rank. ``computed`` holds sources that no checkpoint stores (rotary frequencies);
    ``stored`` says how quantised weights are read that the checkpoint holds as such."""

    def part(tensor: Tensor, shard: Shard | None) -> Tensor:
        # All groups of a row may share one scale, which every part of the row then has.
        if shard is None or tensor.shape[shard.axis] == 1:
            return tensor
        begin, end = shard.rows(rank, tensor.shape[shard.axis])
        return tensor.narrow(shard.axis, begin, end - begin)

    def source(name: str, shard: Shard | None, dtype: torch.dtype) -> Tensor:
        return part(computed[name] if name in computed else checkpoint.tensor(name), shard).to(dtype)

    rounded, unpacked = _Rounded(), _Unpacked(has_groups=stored is not None and stored.has_groups)

    def make(spec: WeightSpec) -> Tensor:
        if spec.quantised and stored is not None and all(map(is_stored, spec.sources)):
            return unpacked.part(spec, lambda: _stored_matrix(spec, stored, checkpoint, part))
        dtype = torch.float32 if spec.quantised else getattr(torch, spec.dtype)
        parts = [source(name, shard, dtype) for name, shard in zip(spec.sources, spec.source_shards, strict=True)]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        if spec.quantised:
            return rounded.part(whole, spec)
        return pack_weight(whole) if spec.is_packed else whole

    write_weights(path, specs, make, on_tensor)


def _stored_matrix(
    spec: WeightSpec,
    stored: StoredQuantisation,
    checkpoint: Checkpoint,
    part: Callable[[Tensor, Shard | None], Tensor],
) -> StoredMatrix:
    """The sources, a rank's part of each, one below the other."""
    matrices = [stored.matrix(checkpoint, name) for name in spec.sources]

    def joined(name: str) -> Tensor:
        parts = zip(matrices, spec.source_shards, strict=True)
        return torch.cat([part(getattr(matrix, name), shard) for matrix, shard in parts])

    whole = StoredMatrix(values=joined("values"), scale=joined("scale").float(), zero=joined("zero"))
    if not whole.scale.isfinite().all():
        raise ValueError(f"a scale of {', '.join(spec.sources)} is NaN or infinite; fetch the checkpoint again")
    return whole


class _Unpacked:
    """Parts of the stored weight that was read last: they are written one after the other."""

    def __init__(self, *, has_groups: bool) -> None:
        self._has_groups = has_groups
        self._sources: tuple[str, ...] = ()
        self._parts: dict[str, Tensor] = {}

    def part(self, spec: WeightSpec, read: Callable[[], StoredMatrix]) -> Tensor:
        if spec.sources != self._sources:
            matrix = read()
            kind = spec.quantised.partition(".")[0]
            if self._has_groups:
                packed = quantised.stored_packed(matrix.values, matrix.scale, matrix.zero, kind)
                parts = dict(zip((kind, f"{kind}.scale", f"{kind}.zero"), packed, strict=True))
            else:
                parts = {kind: quantised.pack_int8(matrix.values), f"{kind}.scale": matrix.scale.squeeze(1)}
            self._sources, self._parts = spec.sources, parts
        return self._parts[spec.quantised]


class _Rounded:
    """Values and scales of the weight that was rounded last: the two are written one after the other."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        self._parts: dict[str, Tensor] = {}

    def part(self, whole: Tensor, spec: WeightSpec) -> Tensor:
        kind = spec.quantised.removesuffix(".scale")
        key = (spec.sources, kind, spec.group_size)
        if key != self._key:
            if not whole.isfinite().all():
                raise ValueError(
                    f"{', '.join(spec.sources)} holds NaN or infinite values, which no integer stands for;"
                    " fetch the checkpoint again or compile without --quantize"
                )
            values, scale = quantised.quantise_packed(whole, kind, spec.group_size)
            self._key, self._parts = key, {kind: values, f"{kind}.scale": scale}
        return self._parts[spec.quantised]


def num_bytes(spec: WeightSpec) -> int:
    """Of the finished tensor of one rank."""
    return math.prod(spec.shape) * int(getattr(torch, spec.dtype).itemsize)
