"""The dense decoder every family file builds on, as regions: embed, one per kind of layer, head.

With tensor parallelism the ranks share every region: each holds its part of the heads and of the feed-forward size
(``Region.shards``), and what o_proj and down_proj give is summed over the ranks.

The cut between layers is in the middle of the residual add: a region takes ``delta`` and ``residual``, whose sum is the
hidden state, so that the add and the norm after it fuse across the boundary.

A region is a pure function of (inputs, weights) in plain torch and ``torch.ops.xllm``, written once for any token
count; capture exports it, the passes rewrite it. Weights are named as in the checkpoint, with ``{layer}`` for the
layer number. Shape letters are those of runtime/ops.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import xllm_compile.runtime.ops  # noqa: F401  (registers torch.ops.xllm)
from xllm_compile.models.config import DecoderConfig
from xllm_compile.models.rope import cos_sin, rope_constants
from xllm_compile.models.tensor_parallel import RankShape, rank_shape
from xllm_compile.runtime.ops.collectives import all_reduce
from xllm_compile.runtime.ops.kv_rows import row_width
from xllm_compile.runtime.ops.spec import Shard, TensorSpec

MODEL_DTYPE = "model"
"""Stands for the dtype the model is compiled for in a region's input specs."""

Weights = dict[str, Tensor]
RegionFunction = Callable[[dict[str, Tensor], Weights], tuple[Tensor, ...]]

EMBED_WEIGHT = "model.embed_tokens.weight"
FINAL_NORM_WEIGHT = "model.norm.weight"
LAYER = "model.layers.{layer}."


@dataclass(frozen=True, kw_only=True, slots=True)
class Region:
    """One compiled unit. ``weights`` maps each weight's name to the shape that a rank holds."""

    name: str
    inputs: tuple[TensorSpec, ...]
    weights: dict[str, tuple[int, ...]]
    function: RegionFunction
    layers: tuple[int, ...] = ()
    """Layers that run this region; empty for embed and head."""
    float32_weights: frozenset[str] = frozenset()
    """Weights that stay float32 whatever dtype the model is compiled for."""
    shards: Mapping[str, Shard] = field(default_factory=dict)
    """Weights of which a rank holds a part."""


def build_regions(
    config: DecoderConfig, tensor_parallel_size: int = 1, kv_cache_dtype: str = MODEL_DTYPE
) -> list[Region]:
    """Embed, one region per kind of layer in order of first use, head; the same for every rank.

    ``kv_cache_dtype`` is int8 or the model's own.
    Raises TensorParallelError when the model cannot be cut into that many parts.
    """
    shape = rank_shape(config, tensor_parallel_size)
    kinds: dict[int, list[int]] = {}
    for layer, window in enumerate(config.layer_windows):
        kinds.setdefault(window, []).append(layer)
    cache = TensorSpec(
        name="kv_cache",
        shape=("L", "M", 2, shape.num_kv_heads, row_width(config.head_dim, is_int8=kv_cache_dtype == "int8")),
        dtype=kv_cache_dtype,
    )
    layers = [_layer_region(config, shape, window, cache, tuple(numbers)) for window, numbers in kinds.items()]
    return [_embed_region(config), *layers, _head_region(config)]


def checkpoint_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor the checkpoint must hold, and its shape."""
    computed = rope_constants(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for region in build_regions(config):
        for name, shape in region.weights.items():
            for layer in region.layers or (0,):
                if name not in computed:
                    shapes[name.format(layer=layer)] = shape
    return shapes


def _embed_region(config: DecoderConfig) -> Region:
    constants = rope_constants(config)

    def embed(inputs: dict[str, Tensor], weights: Weights) -> tuple[Tensor, ...]:
        hidden = F.embedding(inputs["token_ids"], weights[EMBED_WEIGHT])
        return hidden, torch.zeros_like(hidden), *cos_sin(config, inputs["positions"], inputs["rope_len"], weights)

    return Region(
        name="embed",
        inputs=tuple(
            TensorSpec(name=name, shape=("T",), dtype="int32") for name in ("token_ids", "positions", "rope_len")
        ),
        weights={
            EMBED_WEIGHT: (config.vocab_size, config.hidden_size),
            **{k: tuple(v.shape) for k, v in constants.items()},
        },
        function=embed,
        float32_weights=frozenset(constants),
    )


def _layer_region(
    config: DecoderConfig, rank: RankShape, window: int, kv_cache: TensorSpec, layers: tuple[int, ...]
) -> Region:
    hidden, heads, kv_heads, head_dim = config.hidden_size, rank.num_heads, rank.num_kv_heads, config.head_dim
    eps, scale = config.rms_norm_eps, config.head_dim**-0.5

    def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
        return F.linear(x, weights[LAYER + name + ".weight"], weights.get(LAYER + name + ".bias"))

    def summed_linear(x: Tensor, weights: Weights, name: str) -> Tensor:
        """A linear whose reduction axis is cut over the ranks; its bias is added once, to the sum."""
        if rank.tensor_parallel_size == 1:
            return linear(x, weights, name)
        total = all_reduce(F.linear(x, weights[LAYER + name + ".weight"]))
        bias = weights.get(LAYER + name + ".bias")
        return total if bias is None else total + bias

    def layer(inputs: dict[str, Tensor], weights: Weights) -> tuple[Tensor, ...]:
        cache, positions = inputs["kv_cache"], inputs["positions"]
        seq_start, slot = inputs["seq_start"], inputs["slot"]
        residual = inputs["residual"] + inputs["delta"]
        x = torch.ops.xllm.rms_norm(residual, weights[LAYER + "input_layernorm.weight"], eps)
        q = linear(x, weights, "self_attn.q_proj").view(-1, heads, head_dim)
        k = linear(x, weights, "self_attn.k_proj").view(-1, kv_heads, head_dim)
        v = linear(x, weights, "self_attn.v_proj").view(-1, kv_heads, head_dim)
        if config.has_qk_norm:
            q = torch.ops.xllm.rms_norm(q, weights[LAYER + "self_attn.q_norm.weight"], eps)
            k = torch.ops.xllm.rms_norm(k, weights[LAYER + "self_attn.k_norm.weight"], eps)
        q = torch.ops.xllm.rope(q, inputs["cos"], inputs["sin"])
        k = torch.ops.xllm.rope(k, inputs["cos"], inputs["sin"])
        torch.ops.xllm.kv_write(k, v, cache, positions, seq_start, slot)
        attended = torch.ops.xllm.attention(q, cache, seq_start, inputs["context_len"], slot, scale, window)
        residual = residual + summed_linear(attended.view(-1, heads * head_dim), weights, "self_attn.o_proj")
        x = torch.ops.xllm.rms_norm(residual, weights[LAYER + "post_attention_layernorm.weight"], eps)
        gated = F.silu(linear(x, weights, "mlp.gate_proj")) * linear(x, weights, "mlp.up_proj")
        return summed_linear(gated, weights, "mlp.down_proj"), residual

    def projection(name: str, rows: int, columns: int, has_bias: bool) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {LAYER + name + ".weight": (rows, columns)}
        if has_bias:
            shapes[LAYER + name + ".bias"] = (rows,)
        return shapes

    weights: dict[str, tuple[int, ...]] = {
        LAYER + "input_layernorm.weight": (hidden,),
        **projection("self_attn.q_proj", heads * head_dim, hidden, config.has_qkv_bias),
        **projection("self_attn.k_proj", kv_heads * head_dim, hidden, config.has_qkv_bias),
        **projection("self_attn.v_proj", kv_heads * head_dim, hidden, config.has_qkv_bias),
        **projection("self_attn.o_proj", hidden, heads * head_dim, config.has_o_bias),
        LAYER + "post_attention_layernorm.weight": (hidden,),
        **projection("mlp.gate_proj", rank.intermediate_size, hidden, config.has_mlp_bias),
        **projection("mlp.up_proj", rank.intermediate_size, hidden, config.has_mlp_bias),
        **projection("mlp.down_proj", hidden, rank.intermediate_size, config.has_mlp_bias),
    }
    if config.has_qk_norm:
        weights |= {LAYER + f"self_attn.{side}_norm.weight": (head_dim,) for side in "qk"}
    return Region(
        name=f"layer.window{window}" if window else "layer",
        inputs=(
            TensorSpec(name="delta", shape=("T", hidden), dtype=MODEL_DTYPE),
            TensorSpec(name="residual", shape=("T", hidden), dtype=MODEL_DTYPE),
            TensorSpec(name="cos", shape=("T", config.rotary_dim // 2), dtype="float32"),
            TensorSpec(name="sin", shape=("T", config.rotary_dim // 2), dtype="float32"),
            TensorSpec(name="positions", shape=("T",), dtype="int32"),
            TensorSpec(name="seq_start", shape=("S1",), dtype="int32"),
            TensorSpec(name="context_len", shape=("S",), dtype="int32"),
            TensorSpec(name="slot", shape=("S",), dtype="int32"),
            kv_cache,
        ),
        weights=weights,
        function=layer,
        layers=layers,
        shards={name: shard for name in weights if (shard := rank.shard(name.removeprefix(LAYER))) is not None},
    )


def _head_region(config: DecoderConfig) -> Region:
    lm_head = EMBED_WEIGHT if config.tie_word_embeddings else "lm_head.weight"

    def head(inputs: dict[str, Tensor], weights: Weights) -> tuple[Tensor, ...]:
        hidden = inputs["residual"] + inputs["delta"]
        x = torch.ops.xllm.rms_norm(hidden, weights[FINAL_NORM_WEIGHT], config.rms_norm_eps)
        logits = F.linear(x, weights[lm_head]).float()
        return (logits.index_select(0, inputs["logits_at"]),)

    return Region(
        name="head",
        inputs=(
            TensorSpec(name="delta", shape=("T", config.hidden_size), dtype=MODEL_DTYPE),
            TensorSpec(name="residual", shape=("T", config.hidden_size), dtype=MODEL_DTYPE),
            TensorSpec(name="logits_at", shape=("R",), dtype="int32"),
        ),
        weights={FINAL_NORM_WEIGHT: (config.hidden_size,), lm_head: (config.vocab_size, config.hidden_size)},
        function=head,
    )


def pool_region(config: DecoderConfig) -> Region:
    """In place of the head, for embeddings: the final hidden states of chosen rows."""

    def pool(inputs: dict[str, Tensor], weights: Weights) -> tuple[Tensor, ...]:
        hidden = inputs["residual"] + inputs["delta"]
        x = torch.ops.xllm.rms_norm(hidden, weights[FINAL_NORM_WEIGHT], config.rms_norm_eps)
        return (x.float().index_select(0, inputs["pool_at"]),)

    return Region(
        name="pool",
        inputs=(
            TensorSpec(name="delta", shape=("T", config.hidden_size), dtype=MODEL_DTYPE),
            TensorSpec(name="residual", shape=("T", config.hidden_size), dtype=MODEL_DTYPE),
            TensorSpec(name="pool_at", shape=("R",), dtype="int32"),
        ),
        weights={FINAL_NORM_WEIGHT: (config.hidden_size,)},
        function=pool,
    )
