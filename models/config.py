"""What a decoder-only model is, read from a Hugging Face ``config.json`` by its family file."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DTYPES = ("bfloat16", "float32")


class UnsupportedModelError(ValueError):
    """The checkpoint asks for something this project does not do. The message says what, and what is supported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary embedding; field names are those of the checkpoint's ``rope_parameters``."""

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    partial_rotary_factor: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """Shape and options of a dense decoder. Sizes in elements, windows in tokens (0 is full attention)."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    layer_windows: tuple[int, ...]
    tie_word_embeddings: bool = False
    has_qkv_bias: bool = False
    has_o_bias: bool = False
    has_mlp_bias: bool = False
    has_qk_norm: bool = False

    def __post_init__(self) -> None:
        if len(self.layer_windows) != self.num_layers:
            raise UnsupportedModelError(
                f"layer_types names {len(self.layer_windows)} layers, num_hidden_layers is {self.num_layers};"
                " config.json contradicts itself"
            )
        if self.num_heads % self.num_kv_heads:
            raise UnsupportedModelError(
                f"num_attention_heads={self.num_heads} is no multiple of num_key_value_heads={self.num_kv_heads}"
            )

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rope.partial_rotary_factor)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "DecoderConfig":
        rope = RopeConfig(**values["rope"])
        return cls(**{**values, "rope": rope, "layer_windows": tuple(values["layer_windows"])})


def read_hf_config(model_dir: Path) -> dict[str, Any]:
    """The model directory's config.json. Raises ValueError with the next step when it is missing or no JSON object."""
    path = model_dir / "config.json"
    if not model_dir.is_dir():
        raise ValueError(f"{model_dir} is no directory; give a Hugging Face model directory")
    if not path.is_file():
        raise ValueError(
            f"{model_dir} has no config.json; give a Hugging Face model directory (config.json, *.safetensors)"
        )
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as err:
        raise ValueError(f"{path} is not valid JSON ({err}); fetch the checkpoint again") from err
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not an object; fetch the checkpoint again")
    return values


def require(values: Mapping[str, Any], key: str, kind: type | tuple[type, ...] = int) -> Any:
    """values[key], checked for its type. Raises ValueError naming the key."""
    value = values.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
        raise ValueError(f"config.json: {key} is {value!r}, must be {wanted}; fetch the checkpoint again")
    return value


def decoder_config(hf: Mapping[str, Any], **overrides: Any) -> DecoderConfig:
    """The fields that every dense decoder family shares; the family adds its own by keyword."""
    num_heads = require(hf, "num_attention_heads")
    hidden_size = require(hf, "hidden_size")
    activation = hf.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModelError(f"hidden_act={activation!r} is not supported; supported: silu")
    fields: dict[str, Any] = {
        "architecture": hf["architectures"][0],
        "vocab_size": require(hf, "vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": require(hf, "intermediate_size"),
        "num_layers": require(hf, "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": hf.get("num_key_value_heads") or num_heads,
        "head_dim": hf.get("head_dim") or hidden_size // num_heads,
        "rms_norm_eps": require(hf, "rms_norm_eps", (float, int)),
        "max_position_embeddings": require(hf, "max_position_embeddings"),
        "rope": rope_config(hf),
        "layer_windows": layer_windows(hf),
        "tie_word_embeddings": bool(hf.get("tie_word_embeddings", False)),
    }
    return DecoderConfig(**{**fields, **overrides})


def layer_windows(hf: Mapping[str, Any]) -> tuple[int, ...]:
    """Attention window of each layer: from layer_types, or the older use_sliding_window and max_window_layers."""
    num_layers = require(hf, "num_hidden_layers")
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    kinds = hf.get("layer_types")
    if kinds is None:
        first = hf.get("max_window_layers", num_layers)
        kinds = ["sliding_attention" if window and i >= first else "full_attention" for i in range(num_layers)]
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise UnsupportedModelError(f"layer_types has {unknown}; supported: full_attention, sliding_attention")
    if "sliding_attention" in kinds and not window:
        raise UnsupportedModelError(
            f"layer_types asks for sliding_attention, but sliding_window={hf.get('sliding_window')!r} and"
            f" use_sliding_window={hf.get('use_sliding_window')!r}; config.json contradicts itself"
        )
    return tuple(int(window or 0) if kind == "sliding_attention" else 0 for kind in kinds)


_ROPE_TYPES = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def rope_config(hf: Mapping[str, Any]) -> RopeConfig:
    """From ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (earlier)."""
    given = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    given.setdefault("rope_theta", hf.get("rope_theta", 10000.0))
    given.setdefault("partial_rotary_factor", hf.get("partial_rotary_factor") or 1.0)
    # Before transformers 4.43 the key was "type"; "mrope" checkpoints carry both.
    rope_type = given.pop("rope_type", None) or given.get("type") or "default"
    given.pop("type", None)
    if rope_type not in _ROPE_TYPES:
        raise UnsupportedModelError(f"rope type {rope_type!r} is not supported; supported: {', '.join(_ROPE_TYPES)}")
    missing = sorted(key for key in _ROPE_TYPES[rope_type] if given.get(key) is None)
    if missing:
        raise UnsupportedModelError(f"rope type {rope_type!r} needs {', '.join(missing)}; config.json lacks them")
    known = set(RopeConfig.__dataclass_fields__)
    unknown = sorted(set(given) - known)
    if unknown:
        raise UnsupportedModelError(f"rope parameters {unknown} are not supported; supported: {sorted(known)}")
    if rope_type == "yarn" and given.get("original_max_position_embeddings") is None:
        given["original_max_position_embeddings"] = require(hf, "max_position_embeddings")
    return RopeConfig(rope_type=rope_type, **{key: value for key, value in given.items() if value is not None})
