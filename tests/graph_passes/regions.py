"""Small regions captured the way models are, and their outputs computed without any kernel."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from tests.helpers import FAMILIES
from xllm_compile.capture import capture_region
from xllm_compile.graph_passes.pipeline import PassFunction
from xllm_compile.graph_passes.region import PassReport, RegionGraph
from xllm_compile.graph_passes.verify import verify_graph
from xllm_compile.models.config import DecoderConfig
from xllm_compile.models.decoder import Region, RegionFunction, build_regions
from xllm_compile.models.registry import read_model_config
from xllm_compile.runtime.ops import quantised, reference
from xllm_compile.runtime.ops.spec import TensorSpec, WeightSpec

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
DTYPES = [torch.float32, torch.bfloat16]
# Sequences of a step as (new tokens, tokens in the cache before): prefill, a later chunk, a decode; and one token.
MIXED = ((5, 0), (3, 4), (1, 8))
SINGLE = ((1, 0),)
SLOTS, SLOT_TOKENS = 4, 12

aten = torch.ops.aten


def family_config(family: str, **changes: Any) -> DecoderConfig:
    options = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, **FAMILIES[family], **changes}
    return read_model_config({**options, "architectures": [ARCHITECTURES[family]]})


def family_regions(config: DecoderConfig, dtype: torch.dtype, tensor_parallel_size: int = 1) -> list[RegionGraph]:
    return [_capture(region, dtype) for region in build_regions(config, tensor_parallel_size)]


def embed_graph(config: DecoderConfig, dtype: torch.dtype = torch.float32) -> RegionGraph:
    return _capture(build_regions(config)[0], dtype)


def layer_graph(config: DecoderConfig, dtype: torch.dtype = torch.float32) -> RegionGraph:
    return _capture(build_regions(config)[1], dtype)


def head_graph(config: DecoderConfig, dtype: torch.dtype = torch.float32) -> RegionGraph:
    return _capture(build_regions(config)[-1], dtype)


def region_graph(
    function: RegionFunction,
    inputs: Mapping[str, tuple[int | str, ...]],
    weights: Mapping[str, tuple[int, ...]] | None = None,
    *,
    name: str = "layer",
    dtype: torch.dtype = torch.float32,
    int_inputs: Mapping[str, tuple[int | str, ...]] | None = None,
) -> RegionGraph:
    """Capture ``function`` as the region ``name``; ``inputs`` have the model's dtype, ``int_inputs`` int32."""
    specs = [TensorSpec(name=key, shape=shape, dtype="model") for key, shape in inputs.items()]
    specs += [TensorSpec(name=key, shape=shape, dtype="int32") for key, shape in (int_inputs or {}).items()]
    region = Region(name=name, inputs=tuple(specs), weights=dict(weights or {}), function=function)
    return _capture(region, dtype)


# Shapes of the sources of every region that was captured, by name: a merged or packed spec no longer tells them.
_SOURCE_SHAPES: dict[str, tuple[int, ...]] = {}


def _capture(region: Region, dtype: torch.dtype) -> RegionGraph:
    _SOURCE_SHAPES.update(region.weights)
    return capture_region(region, dtype)


def apply(run_pass: PassFunction, region: RegionGraph) -> PassReport:
    """Run one pass between two verifications."""
    verify_graph(region, after="capture")
    report = run_pass(region)
    verify_graph(region, after=report.name)
    return report


def assert_untouched(run_pass: PassFunction, region: RegionGraph, *reasons: str) -> None:
    """The pass matches nothing, says why, and leaves the code as it was."""
    before = region.module.code
    report = apply(run_pass, region)
    assert report.matches == 0
    assert sorted(report.skips) == sorted(reasons)
    assert region.module.code == before


def assert_finds_nothing(run_pass: PassFunction, region: RegionGraph) -> None:
    """A second run matches nothing and changes nothing."""
    before = region.module.code
    assert apply(run_pass, region).matches == 0
    assert region.module.code == before


class _Plain(fx.Interpreter):
    """Runs our operators as their reference, whatever kernels are loaded, and each output of a linear by itself, so
    that no result depends on how many there are."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if getattr(target, "namespace", "") == "xllm":
            target = getattr(reference, target._schema.name.partition("::")[2])
        elif target is aten.linear.default:
            target = _linear
        return super().call_function(target, args, kwargs)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = (x.float().unsqueeze(1) * weight.float()).sum(-1)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def run_graph(
    region: RegionGraph,
    inputs: Mapping[str, Tensor],
    seed: int = 0,
    change: Callable[[WeightSpec, Tensor], Tensor] = lambda spec, weight: weight,
    *,
    on_kernels: bool = False,
) -> dict[str, Tensor]:
    """Outputs by number and inputs after the run by name. Weights are random and depend on their sources' names and
    the seed only, so that a rewritten graph gets the same ones; ``change`` may put another in a weight's place.
    ``on_kernels``: whatever kernels are loaded run it."""
    given = {name: value.clone() for name, value in inputs.items()}
    arguments = [given[spec.name] for spec in region.inputs]
    arguments += [change(spec, make_weight(spec, seed)) for spec in region.weights.values()]
    with torch.no_grad():
        outputs = region.module(*arguments) if on_kernels else _Plain(region.module).run(*arguments)
    return {**given, **{str(index): output for index, output in enumerate(outputs)}}


def make_weight(spec: WeightSpec, seed: int) -> Tensor:
    if spec.quantised:
        return _make_quantised(spec, seed)
    dtype = getattr(torch, spec.dtype)
    parts = [_random(name, _SOURCE_SHAPES[name], seed).to(dtype) for name in spec.sources]
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    return reference.pack_weight(whole) if spec.is_packed else whole


def _make_quantised(spec: WeightSpec, seed: int) -> Tensor:
    kind = spec.quantised.removesuffix(".scale")
    whole = torch.cat([_random(name, _SOURCE_SHAPES[name], seed) for name in spec.sources])
    return quantised.quantise_packed(whole, kind, spec.group_size)[spec.quantised.endswith(".scale")]


def _random(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(ord(c) * (i + 1) for i, c in enumerate(name)))
    return torch.randn(shape, generator=generator) / max(1, shape[-1]) ** 0.5


def assert_same_outputs(
    before: RegionGraph, after: RegionGraph, inputs: Mapping[str, Tensor], *, rtol: float = 0, atol: float = 0
) -> None:
    """Both graphs give the same, bitwise unless a tolerance is given, and leave their inputs the same."""
    expected, found = run_graph(before, inputs), run_graph(after, inputs)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol)


def layer_inputs(
    config: DecoderConfig, dtype: torch.dtype, step: tuple[tuple[int, int], ...], padding: int = 0, seed: int = 0
) -> dict[str, Tensor]:
    """Inputs of a layer region for the step, with ``padding`` rows that belong to no sequence."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def ints(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    lengths = [count for count, _ in step]
    rows = sum(lengths) + padding
    angles = rand(rows, config.rotary_dim // 2)
    return {
        "delta": rand(rows, config.hidden_size).to(dtype),
        "residual": rand(rows, config.hidden_size).to(dtype),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "positions": ints([before + i for count, before in step for i in range(count)] + [0] * padding),
        "seq_start": ints([sum(lengths[:i]) for i in range(len(lengths) + 1)]),
        "context_len": ints([count + before for count, before in step]),
        "slot": ints([(2 * i + 1) % SLOTS for i in range(len(step))]),
        "kv_cache": rand(SLOTS, SLOT_TOKENS, 2, config.num_kv_heads, config.head_dim).to(dtype),
    }
