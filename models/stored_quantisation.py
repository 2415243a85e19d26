"""Checkpoints whose weights are quantised already: what config.json says of them, and their matrices as integers.

Every format is brought to one form, without rounding anything again: ``weight = (values - zero) * scale``. Read are

- **compressed-tensors** ``pack-quantized``: int4 and int8 with a scale per group or row, with or without zero points;
  elements of 4 or 8 bits, less their smallest value, in int32 words along the reduction axis, the lowest first; zero
  points alike along the output axis.
- **compressed-tensors** ``int-quantized``: int8 with a scale per row, as it is; activations plain or rounded per token.
- **awq** ``gemm``: int4, transposed; in a word of eight outputs the even ones come first.
- **gptq**: int4 and int8, transposed; words along the reduction axis; zero points along the output axis, and less one
  but for ``gptq_v2``.

Sources: the packages compressed-tensors 0.20, AutoAWQ and GPTQModel, which write them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xllm_compile.models.checkpoint import FLOAT_DTYPES, Checkpoint, CheckpointError
from xllm_compile.models.config import UnsupportedModelError

METHODS = ("compressed-tensors", "awq", "gptq")
_WORD_BITS = 32
# Output of a word of AWQ, by the place of its bits.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_FLOATS, _WORDS = tuple(FLOAT_DTYPES), ("I32",)

PartShapes = dict[str, tuple[tuple[int, ...], tuple[str, ...]]]
"""Tensor name -> shape and the dtypes it may have."""


def is_stored(weight: str) -> bool:
    """Whether a quantised checkpoint holds this matrix quantised: those of the layers and no other."""
    return ".layers." in weight


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredMatrix:
    """weight [N, C] = (values - zero) * scale, each group of C / G elements with its own."""

    values: Tensor
    """[N, C] int8: -8..7 or -128..127."""
    scale: Tensor
    """[N, G], in the checkpoint's dtype."""
    zero: Tensor
    """[N, G] int8: in the range of the values."""

    def dequantised(self) -> Tensor:
        """[N, C] in the scale's dtype, rounded as the formats' own packages do it."""
        group_size = self.values.shape[1] // self.scale.shape[1]
        scale, zero = (part.repeat_interleave(group_size, 1) for part in (self.scale, self.zero))
        return (self.values.to(scale.dtype) - zero.to(scale.dtype)) * scale


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredQuantisation:
    """How the products of a checkpoint's layers are stored."""

    method: str
    layout: str
    """pack-quantized, int-quantized, gemm, gptq or gptq_v2."""
    num_bits: int
    group_size: int
    """Elements along the reduction axis that share a scale; 0 is all of them."""
    is_symmetric: bool
    """Without zero points."""
    has_dynamic_activations: bool = False
    """Activations are rounded to int8, with one scale per token."""

    @property
    def has_groups(self) -> bool:
        """Whether scales and zero points are those of groups, be they whole rows: all but int8 with a scale per row and
        without zero points."""
        return self.num_bits == 4 or self.group_size > 0 or not self.is_symmetric

    @property
    def scheme(self) -> str:
        """As the quantise pass names it."""
        return "int4" if self.num_bits == 4 else "int8-dynamic" if self.has_dynamic_activations else "int8"

    def parts(self, weight: str, shape: tuple[int, ...]) -> PartShapes:
        """What is stored in place of the weight [N, C]. Raises UnsupportedModelError where C is not whole groups."""
        rows, columns = shape
        if columns % (self.group_size or columns):
            raise UnsupportedModelError(
                f"{weight} has {columns} inputs, no multiple of group_size={self.group_size} in quantization_config;"
                " use an unquantised checkpoint"
            )
        groups, base = columns // (self.group_size or columns), weight.removesuffix("weight")
        per_word = _WORD_BITS // self.num_bits
        if self.method == "compressed-tensors":
            scale = {f"{weight}_scale": ((rows, groups), _FLOATS)}
            if self.layout == "int-quantized":
                return {weight: (shape, ("I8",)), **scale}
            words = -(-columns * self.num_bits // _WORD_BITS)
            parts: PartShapes = {f"{weight}_packed": ((rows, words), _WORDS), **scale}
            if not self.is_symmetric:
                parts[f"{weight}_zero_point"] = ((-(-rows // per_word), groups), _WORDS)
            return parts
        packed = (columns, rows // per_word) if self.method == "awq" else (columns // per_word, rows)
        parts = {
            f"{base}qweight": (packed, _WORDS),
            f"{base}qzeros": ((groups, rows // per_word), _WORDS),
            f"{base}scales": ((groups, rows), _FLOATS),
        }
        return parts if self.method == "awq" else {**parts, f"{base}g_idx": ((columns,), _WORDS)}

    def check(self, checkpoint: Checkpoint, weights: Mapping[str, tuple[int, ...]]) -> None:
        """Every part of every weight is there. Raises CheckpointError and UnsupportedModelError naming the first."""
        parts = {name: part for weight, shape in weights.items() for name, part in self.parts(weight, shape).items()}
        try:
            checkpoint.check(
                {name: shape for name, (shape, _) in parts.items()},
                {name: dtypes for name, (_, dtypes) in parts.items()},
            )
        except CheckpointError as err:
            raise CheckpointError(
                f"{err}; of a checkpoint with quant_method={self.method!r} every product of every layer is expected to"
                " be quantised alike"
            ) from err
        for weight, (_, columns) in weights.items() if self.method == "gptq" else ():
            name = weight.removesuffix("weight") + "g_idx"
            if not torch.equal(checkpoint.tensor(name).long(), torch.arange(columns) // (self.group_size or columns)):
                raise UnsupportedModelError(
                    f"{name} does not number the groups in order (desc_act=true in quantization_config), which is not"
                    " supported; use a checkpoint made with desc_act=false"
                )

    def matrix(self, checkpoint: Checkpoint, weight: str) -> StoredMatrix:
        """One weight, unpacked."""
        if self.method == "compressed-tensors":
            return self._compressed_matrix(checkpoint, weight)
        base = weight.removesuffix("weight")
        words, zeros = checkpoint.tensor(base + "qweight"), checkpoint.tensor(base + "qzeros")
        if self.method == "awq":
            codes, zero = _awq_columns(words), _awq_columns(zeros)
        else:
            codes, zero = _unpack(words, self.num_bits, axis=0), _unpack(zeros, self.num_bits, axis=1)
            if self.layout == "gptq":
                # Stored less one; of 0 that is the largest code.
                zero = zero + 1 & (1 << self.num_bits) - 1
        scale = checkpoint.tensor(base + "scales").T
        return StoredMatrix(values=_signed(codes.T, self.num_bits), scale=scale, zero=_signed(zero.T, self.num_bits))

    def _compressed_matrix(self, checkpoint: Checkpoint, weight: str) -> StoredMatrix:
        scale = checkpoint.tensor(f"{weight}_scale")
        zero = torch.zeros(scale.shape, dtype=torch.int8)
        if self.layout == "int-quantized":
            return StoredMatrix(values=checkpoint.tensor(weight), scale=scale, zero=zero)
        # Words are filled to their end, also where the row is not: what is too much is cut by the stored shape.
        columns = int(checkpoint.tensor(f"{weight}_shape")[1])
        codes = _unpack(checkpoint.tensor(f"{weight}_packed"), self.num_bits, axis=1)[:, :columns]
        if not self.is_symmetric:
            zeros = _unpack(checkpoint.tensor(f"{weight}_zero_point"), self.num_bits, axis=0)
            zero = _signed(zeros[: scale.shape[0]], self.num_bits)
        return StoredMatrix(values=_signed(codes, self.num_bits), scale=scale, zero=zero)


def read_stored_quantisation(hf: Mapping[str, Any]) -> StoredQuantisation | None:
    """From config.json; None for a checkpoint that is not quantised.

    Raises UnsupportedModelError naming the field, its value and what is supported.
    """
    config = hf.get("quantization_config") or hf.get("compression_config")
    if not config:
        return None
    if not isinstance(config, Mapping):
        raise ValueError(
            f"config.json: quantization_config is {config!r}, must be an object; fetch the checkpoint again"
        )
    method = config.get("quant_method")
    if method == "compressed-tensors":
        return _read_compressed(config)
    if method == "awq":
        _require(config, "version", ("gemm",), "gemm")
        _require(config, "zero_point", (True,), True)
    elif method == "gptq":
        _require(config, "checkpoint_format", ("gptq", "gptq_v2"), "gptq")
        _require(config, "lm_head", (False,), False)
        _require(config, "dynamic", (None, {}), None)
        _require(config, "is_marlin_format", (False,), False)
    else:
        raise UnsupportedModelError(
            f"quantization_config: quant_method={method!r} is not supported; supported: {', '.join(METHODS)}."
            " Use one of these, or a bfloat16, float16 or float32 checkpoint, which --quantize int8, int4,"
            " int8-dynamic or int4-dynamic rounds while compiling"
        )
    _require(config, "bits", (4, 8) if method == "gptq" else (4,), None)
    return StoredQuantisation(
        method=method,
        layout="gemm" if method == "awq" else config.get("checkpoint_format", "gptq"),
        num_bits=config["bits"],
        group_size=_group_size(config, "quantization_config"),
        is_symmetric=False,
    )


def _read_compressed(config: Mapping[str, Any]) -> StoredQuantisation:
    groups = config.get("config_groups") or {}
    if len(groups) != 1:
        raise UnsupportedModelError(
            f"quantization_config: config_groups has {len(groups)} groups ({', '.join(groups)}), supported: one for all"
            " products; use another checkpoint"
        )
    ((name, group),) = groups.items()
    if not isinstance(group, Mapping):
        raise _unsupported(
            "quantization_config", f"config_groups.{name}", group, ("an object with targets and weights",)
        )
    where, weights = f"quantization_config: config_groups.{name}", group.get("weights") or {}
    layout = group.get("format") or config.get("format")
    if layout not in ("pack-quantized", "int-quantized"):
        raise _unsupported("quantization_config", "format", layout, ("pack-quantized", "int-quantized"))
    _require(config, "kv_cache_scheme", (None,), None)
    _require(group, "output_activations", (None,), None, where)
    _require(config.get("sparsity_config") or {}, "format", ("dense",), "dense", "quantization_config: sparsity_config")
    where_weights = f"{where}.weights"
    _require(weights, "type", ("int",), "int", where_weights)
    _require(weights, "num_bits", (4, 8) if layout == "pack-quantized" else (8,), None, where_weights)
    strategies = ("group", "channel") if layout == "pack-quantized" else ("channel",)
    _require(weights, "strategy", strategies, None, where_weights)
    _require(weights, "actorder", (None, False, "weight", "static"), None, where_weights)
    if layout == "int-quantized":
        _require(weights, "symmetric", (True,), True, where_weights)
    activations = group.get("input_activations")
    if activations:
        where_inputs = f"{where}.input_activations"
        if layout != "int-quantized":
            raise _unsupported(where, "input_activations", activations, (None,))
        for key, supported in (("num_bits", 8), ("type", "int"), ("dynamic", True), ("strategy", "token")):
            _require(activations, key, (supported,), None, where_inputs)
        _require(activations, "symmetric", (True,), True, where_inputs)
    return StoredQuantisation(
        method="compressed-tensors",
        layout=layout,
        num_bits=weights["num_bits"],
        group_size=_group_size(weights, where_weights) if weights["strategy"] == "group" else 0,
        is_symmetric=bool(weights.get("symmetric", True)),
        has_dynamic_activations=bool(activations),
    )


def _group_size(config: Mapping[str, Any], where: str) -> int:
    """-1 is the whole row. The kernels want whole steps of eight elements."""
    size = config.get("group_size")
    if not isinstance(size, int) or (size != -1 and (size < 8 or size % 8)):
        raise _unsupported(where, "group_size", size, ("-1", "multiples of 8"))
    return max(size, 0)


def _require(
    config: Mapping[str, Any], key: str, supported: tuple[Any, ...], default: Any, where: str = "quantization_config"
) -> None:
    value = config.get(key, default)
    if (value.lower() if isinstance(value, str) else value) not in supported:
        raise _unsupported(where, key, value, supported)


def _unsupported(where: str, key: str, value: Any, supported: tuple[Any, ...]) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{where}: {key}={value!r} is not supported; supported: {', '.join(map(str, supported))}."
        " Use such a checkpoint, or an unquantised one with --quantize"
    )


def _unpack(words: Tensor, num_bits: int, axis: int) -> Tensor:
    """int32 words to the codes in them, in place of the axis, lowest bits first."""
    shifts = torch.arange(0, _WORD_BITS, num_bits, dtype=torch.int32)
    shifts = shifts.view(-1, 1) if axis == 0 else shifts
    return (words.unsqueeze(axis + 1) >> shifts & (1 << num_bits) - 1).flatten(axis, axis + 1)


def _awq_columns(words: Tensor) -> Tensor:
    """[rows, N / 8] words -> [rows, N] codes."""
    codes = _unpack(words, 4, axis=1).view(words.shape[0], -1, 8)
    places = sorted(range(8), key=_AWQ_ORDER.__getitem__)
    return codes[..., places].flatten(1)


def _signed(codes: Tensor, num_bits: int) -> Tensor:
    return (codes - (1 << num_bits - 1)).to(torch.int8).contiguous()
