"""From a model's regions to FX graphs: torch.export, then the placeholder names the passes and the artifact use."""

import linecache
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode

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
    inputs, specs = _specs(region, dtype)
    example_inputs, example_weights = _examples(inputs, specs)
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


def _specs(region: Region, dtype: torch.dtype) -> tuple[tuple[TensorSpec, ...], list[WeightSpec]]:
    """The region's inputs and weights for a model of ``dtype``."""
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
            shards=(region.shards.get(name),),
        )
        for name, shape in region.weights.items()
    ]
    return inputs, specs


def _examples(inputs: Sequence[TensorSpec], weights: Sequence[WeightSpec]) -> tuple[list[Tensor], list[Tensor]]:
    """Fake tensors: shapes and dtypes, no memory."""
    with FakeTensorMode():
        return (
            [torch.empty(concrete_shape(spec, TRACE_SIZES), dtype=getattr(torch, spec.dtype)) for spec in inputs],
            [torch.empty(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in weights],
        )


class _Locator(TorchDispatchMode):
    """Remembers the line of Python that first called an operator."""

    def __init__(self, operator: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operator = operator
        self.place: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == self.operator and self.place is None:
            self.place = _model_line()
        return func(*args, **(kwargs or {}))


def _model_line() -> str | None:
    """The innermost line on the stack that is neither torch's nor this file's."""
    torch_folder = str(Path(torch.__file__).parent)
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((torch_folder, __file__, "<")):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return None
    file, line = frame.f_code.co_filename, frame.f_lineno
    return f"{Path(file).parent.name}/{Path(file).name}:{line}: {linecache.getline(file, line).strip()}"


def locate_operator(region: Region, dtype: torch.dtype, operator: str) -> str | None:
    """File, line and text of the model's source that calls ``operator`` ("aten::x"); None if nothing does."""
    inputs, specs = _specs(region, dtype)
    values, weights = _examples(inputs, specs)
    locator = _Locator(operator)
    with locator:
        _RegionModule(region)(values, weights)
    return locator.place


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
