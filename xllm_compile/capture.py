"""From a model's regions to FX graphs: torch.export, then the placeholder names the passes and the artifact use."""

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from xllm_compile.graph_passes.region import RegionGraph, placeholder_name
from xllm_compile.models.decoder import MODEL_DTYPE, Region
from xllm_compile.runtime.ops.spec import TensorSpec, WeightSpec
from xllm_compile.runtime.program import RegionProgram, concrete_shape

# Sizes used while tracing: distinct, above 1 (export specialises 0 and 1) and no multiple of anything in a model.
TRACE_SIZES = {"T": 7, "S": 3, "S1": 5, "R": 2, "L": 11, "M": 13}


class _RegionModule(nn.Module):
    def __init__(self, region: Region) -> None:
        super().__init__()
        self.region = region

    def forward(self, inputs: list[Tensor], weights: list[Tensor]) -> tuple[Tensor, ...]:
        named_inputs = {spec.name: value for spec, value in zip(self.region.inputs, inputs, strict=True)}
        named_weights = dict(zip(self.region.weights, weights, strict=True))
        return self.region.function(named_inputs, named_weights)


def capture_region(region: Region, dtype: torch.dtype) -> RegionGraph:
    """Export one region for any token count. No weight is read: tensors are fake."""
    model_dtype = str(dtype).removeprefix("torch.")
    inputs = tuple(
        TensorSpec(name=s.name, shape=s.shape, dtype=model_dtype if s.dtype == MODEL_DTYPE else s.dtype)
        for s in region.inputs
    )
    specs = [
        WeightSpec(
            name=name,
            sources=(name,),
            shape=shape,
            dtype="float32" if name in region.float32_weights else model_dtype,
        )
        for name, shape in region.weights.items()
    ]
    with FakeTensorMode():
        example_inputs = [
            torch.empty(concrete_shape(spec, TRACE_SIZES), dtype=getattr(torch, spec.dtype)) for spec in inputs
        ]
        example_weights = [torch.empty(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in specs]
    exported = torch.export.export(
        _RegionModule(region),
        (example_inputs, example_weights),
        dynamic_shapes=([dynamic_dims(spec) for spec in inputs], [None] * len(specs)),
        strict=False,
    )
    module = exported.graph_module
    placeholders = list(module.graph.find_nodes(op="placeholder"))
    names = [spec.name for spec in inputs] + [placeholder_name(spec.name) for spec in specs]
    for node, name in zip(placeholders, names, strict=True):
        node._rename(name)
        node.target = name
    graph = RegionGraph(
        name=region.name, module=module, inputs=inputs, weights=dict(zip(names[len(inputs) :], specs, strict=True))
    )
    graph.finish()
    return graph


def dynamic_dims(spec: TensorSpec) -> dict[int, Dim] | None:
    """The symbolic axes of an input, for torch.export; None when all sizes are fixed."""
    dims = {axis: Dim(symbol, min=2) for axis, symbol in enumerate(spec.shape) if isinstance(symbol, str)}
    return dims or None


def emit_program(
    graph: RegionGraph, layers: tuple[int, ...], *, is_piece: bool = False, is_eager: bool = False
) -> RegionProgram:
    """The region as text, after the passes."""
    return RegionProgram(
        name=graph.name,
        code=graph.module.code.strip() + "\n",
        inputs=graph.inputs,
        weights=tuple(graph.weights.values()),
        layers=layers,
        is_piece=is_piece,
        is_eager=is_eager,
    )
