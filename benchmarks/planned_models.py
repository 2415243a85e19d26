"""Models that are planned on paper: captured and passed as a build would, but never given weights or compiled."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from xllm_compile.capture import capture_region
from xllm_compile.graph_passes.pipeline import cpu_pipeline, run_passes
from xllm_compile.graph_passes.region import RegionGraph
from xllm_compile.models.config import DecoderConfig
from xllm_compile.models.decoder import EMBED_WEIGHT, MODEL_DTYPE, Region, build_regions
from xllm_compile.models.registry import read_model_config
from xllm_compile.runtime.ops.spec import TensorSpec

# config.json of Qwen/Qwen3-8B and Qwen/Qwen3-0.6B: what decides the work.
_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
    "attention_bias": False,
}
PLANNED_MODELS: dict[str, dict[str, Any]] = {
    "qwen3-8b": {
        **_QWEN3,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "qwen3-0.6b": {
        **_QWEN3,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
}


def planned_regions(name: str, dtype: torch.dtype = torch.bfloat16) -> list[tuple[RegionGraph, int]]:
    """The regions after the passes, each with how often a step runs it."""
    return passed_regions(read_model_config(PLANNED_MODELS[name]), dtype)


def passed_regions(config: DecoderConfig, dtype: torch.dtype) -> list[tuple[RegionGraph, int]]:
    """As planned_regions, of any model."""
    tied = frozenset({EMBED_WEIGHT}) if config.tie_word_embeddings else frozenset[str]()
    found = []
    for region in build_regions(config):
        graph = capture_region(region, dtype)
        run_passes(graph, cpu_pipeline(tied_weights=tied))
        found.append((graph, max(1, len(region.layers))))
    return found


def two_micro_batches(region: RegionGraph) -> RegionGraph:
    """The region once for either half of a batch, on streams of their own and with the same weights.

    Inputs come twice, all of the same sizes: a step's shape is that of one half.
    """
    graph = fx.Graph()
    values: list[dict[fx.Node, fx.Node]] = [{}, {}]
    inputs = []
    for half in (0, 1):
        for spec in region.inputs:
            name = f"{spec.name}_{half}"
            node = graph.placeholder(name)
            node.meta.update(region.placeholder(spec.name).meta)
            values[half][region.placeholder(spec.name)] = node
            inputs.append(TensorSpec(name=name, shape=spec.shape, dtype=spec.dtype))
    for name in region.weights:
        node = graph.placeholder(name)
        node.meta.update(region.placeholder(name).meta)
        values[0][region.placeholder(name)] = values[1][region.placeholder(name)] = node
    results: list[Any] = []
    for half in (0, 1):
        for node in region.graph.nodes:
            if node.op == "call_function":
                copied = graph.node_copy(node, values[half].__getitem__)
                copied.meta["stream"] = f"half{half}"
                values[half][node] = copied
        outputs: Any = region.graph.output_node().args[0]
        results += [values[half][output] for output in outputs]
    graph.output(tuple(results))
    module = fx.GraphModule(region.module, graph)
    return RegionGraph(name=region.name, module=module, inputs=tuple(inputs), weights=dict(region.weights))


# DeepSeek-V3's config.json; experts of one device of sixteen that share them.
_HIDDEN, _HEADS, _Q_RANK, _KV_RANK, _NOPE, _ROPE, _VALUE = 7168, 128, 1536, 512, 128, 64, 128
_EXPERTS, _LOCAL_EXPERTS, _TOP_K, _EXPERT_SIZE, _EPS = 256, 16, 8, 2048, 1e-6


def deepseek_v3_layer(dtype: torch.dtype = torch.bfloat16) -> RegionGraph:
    """A decode step of one layer shaped as DeepSeek-V3's: latent attention with absorbed projections, and experts.

    S sequences of one new token over a latent cache of M tokens; R rows for each expert of this device. The exchange of
    rows between devices is left out: it is what comes before and after.
    """
    local = (_LOCAL_EXPERTS, "R")
    region = Region(
        name="layer",
        inputs=(
            TensorSpec(name="delta", shape=("S", _HIDDEN), dtype=MODEL_DTYPE),
            TensorSpec(name="residual", shape=("S", _HIDDEN), dtype=MODEL_DTYPE),
            TensorSpec(name="cos", shape=("S", _ROPE // 2), dtype="float32"),
            TensorSpec(name="sin", shape=("S", _ROPE // 2), dtype="float32"),
            TensorSpec(name="latent_cache", shape=("S", "M", _KV_RANK + _ROPE), dtype=MODEL_DTYPE),
            TensorSpec(name="row_of", shape=local, dtype="int32"),
            TensorSpec(name="row_weight", shape=local, dtype=MODEL_DTYPE),
        ),
        weights={
            "norm": (_HIDDEN,),
            "q_a": (_Q_RANK, _HIDDEN),
            "q_norm": (_Q_RANK,),
            "q_b": (_HEADS * (_NOPE + _ROPE), _Q_RANK),
            "kv_a": (_KV_RANK + _ROPE, _HIDDEN),
            "kv_norm": (_KV_RANK,),
            "k_up": (_HEADS, _NOPE, _KV_RANK),
            "v_up": (_HEADS, _KV_RANK, _VALUE),
            "o": (_HIDDEN, _HEADS * _VALUE),
            "post_norm": (_HIDDEN,),
            "router": (_EXPERTS, _HIDDEN),
            "shared_gate_up": (2 * _EXPERT_SIZE, _HIDDEN),
            "shared_down": (_HIDDEN, _EXPERT_SIZE),
            "gate_up": (_LOCAL_EXPERTS, _HIDDEN, 2 * _EXPERT_SIZE),
            "down": (_LOCAL_EXPERTS, _EXPERT_SIZE, _HIDDEN),
        },
        function=_deepseek_layer,
        layers=(0,),
    )
    return capture_region(region, dtype)


def _deepseek_layer(inputs: dict[str, Tensor], weights: dict[str, Tensor]) -> tuple[Tensor, ...]:
    xllm = torch.ops.xllm
    x, residual = xllm.add_rms_norm(inputs["delta"], inputs["residual"], weights["norm"], _EPS)
    attended, entry = _latent_attention(x, inputs, weights)
    x, residual = xllm.add_rms_norm(F.linear(attended, weights["o"]), residual, weights["post_norm"], _EPS)
    scores = F.linear(x, weights["router"]).float().sigmoid()
    chosen, experts = scores.topk(_TOP_K, dim=-1)
    chosen = chosen / chosen.sum(-1, keepdim=True)
    shared = F.linear(xllm.silu_mul(F.linear(x, weights["shared_gate_up"])), weights["shared_down"])
    rows = inputs["row_of"].flatten()
    routed = x.index_select(0, rows).view(_LOCAL_EXPERTS, -1, _HIDDEN)
    routed = torch.bmm(xllm.silu_mul(torch.bmm(routed, weights["gate_up"])), weights["down"])
    routed = (routed * inputs["row_weight"].unsqueeze(-1)).view(-1, _HIDDEN)
    combined = torch.zeros_like(x).index_add(0, rows, routed)
    return shared + combined, residual, entry, chosen, experts


def _latent_attention(x: Tensor, inputs: dict[str, Tensor], weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(values of all heads [S, heads * value size], the token's own cache entry [S, latent + rope])."""
    xllm, cos, sin = torch.ops.xllm, inputs["cos"], inputs["sin"]
    q = F.linear(xllm.rms_norm(F.linear(x, weights["q_a"]), weights["q_norm"], _EPS), weights["q_b"])
    q_nope, q_rope = q.view(-1, _HEADS, _NOPE + _ROPE).split([_NOPE, _ROPE], dim=-1)
    latent, k_rope = F.linear(x, weights["kv_a"]).split([_KV_RANK, _ROPE], dim=-1)
    k_rope = xllm.rope(k_rope.unsqueeze(1), cos, sin).squeeze(1)
    entry = torch.cat((xllm.rms_norm(latent, weights["kv_norm"], _EPS), k_rope), dim=-1)
    absorbed = torch.bmm(q_nope.transpose(0, 1), weights["k_up"]).transpose(0, 1)
    q = torch.cat((absorbed, xllm.rope(q_rope, cos, sin)), dim=-1)
    cache, scale = inputs["latent_cache"], (_NOPE + _ROPE) ** -0.5
    # The token's own key does not wait for its way through the cache.
    scores = torch.cat((torch.bmm(q, cache.transpose(1, 2)), torch.bmm(q, entry.unsqueeze(-1))), dim=-1) * scale
    past, own = scores.softmax(-1).split([cache.shape[1], 1], dim=-1)
    values = torch.bmm(past, cache[..., :_KV_RANK]) + own * entry[:, None, :_KV_RANK]
    return torch.bmm(values.transpose(0, 1), weights["v_up"]).transpose(0, 1).reshape(x.shape[0], -1), entry
