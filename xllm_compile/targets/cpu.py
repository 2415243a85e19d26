"""CPU target, build time: AOTInductor code around our own C++ kernels."""

import os
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xllm_compile.runtime.program import RegionProgram, concrete_shape

_HANDLE = "AtenTensorHandle"
_C_TYPES = {
    "Tensor": _HANDLE,
    "Optional[Tensor]": f"{_HANDLE}*",
    "int": "int64_t",
    "float": "double",
    "bool": "int32_t",
}
# Stands for a symbolic size while tracing: distinct and above 1, because export specialises 0 and 1.
_DYNAMIC_SIZES = {"T": 6, "S": 3, "S1": 4, "R": 2, "L": 3, "M": 5}


def inductor_options() -> dict[str, Any]:
    """Options of every compilation; part of each graph's cache key."""
    return {
        # The wrapper is a sequence of calls: optimising it harder costs compile time and gains nothing that shows.
        "aot_inductor.compile_wrapper_opt_level": "O1",
        # Inductor would compile and run a probe per instruction set, ten seconds in all; /proc/cpuinfo says the same.
        "cpp.vec_isa_ok": True,
        # The number of threads is the server's choice, not the build's.
        "cpp.dynamic_threads": True,
    }


def compile_program(program: RegionProgram, sizes: Mapping[str, int], output: Path) -> None:
    """Compile one region for one bucket to a shared library at ``output``.

    ``sizes`` fixes symbols (T, S, R, ...); symbols it leaves out stay dynamic. Runs in a build process of its own:
    torch.export and inductor are imported here. Raises whatever they raise; ``output`` is written whole or not at all.
    """
    import torch
    from torch import nn

    class Module(nn.Module):
        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return run(*tensors)

    run = program.load()
    known = {**_DYNAMIC_SIZES, **sizes}
    specs = [(concrete_shape(spec, known), spec.dtype) for spec in program.inputs]
    specs += [(list(spec.shape), spec.dtype) for spec in program.weights]
    # Values are never looked at and memory is never touched: pages of torch.empty arrive on first write only.
    example = tuple(torch.empty(shape, dtype=getattr(torch, dtype)) for shape, dtype in specs)
    dims = [
        {
            axis: torch.export.Dim(name, min=2)
            for axis, name in enumerate(spec.shape)
            if isinstance(name, str) and name not in sizes
        }
        or None
        for spec in program.inputs
    ] + [None] * len(program.weights)
    exported = torch.export.export(Module(), example, dynamic_shapes={"tensors": tuple(dims)}, strict=False)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".inductor-") as scratch:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = scratch
        from torch._inductor import aoti_compile_and_package

        package = aoti_compile_and_package(
            exported,
            package_path=str(Path(scratch) / "graph.pt2"),
            inductor_configs={**inductor_options(), "aot_inductor.custom_ops_to_c_shims": shim_declarations()},
        )
        with zipfile.ZipFile(package) as archive:
            (library,) = [name for name in archive.namelist() if name.endswith(".so")]
            unpacked = Path(scratch) / output.name
            with archive.open(library) as source, unpacked.open("wb") as target:
                shutil.copyfileobj(source, target)
        os.replace(unpacked, output)


def shim_declarations() -> dict[Any, list[str]]:
    """C declarations of the kernels, from the operators' schemas: compiled graphs call them directly."""
    import torch

    from xllm_compile.runtime.ops import SCHEMAS

    declarations = {}
    for name in SCHEMAS:
        overload = getattr(torch.ops.xllm, name).default
        schema = overload._schema
        if not schema.returns:
            continue
        arguments = [f"{_C_TYPES[str(arg.type)]} {arg.name}" for arg in schema.arguments]
        arguments += [f"{_HANDLE}* ret{index}" for index in range(len(schema.returns))]
        declarations[overload] = [f"AOTITorchError aoti_torch_cpu_{name}({', '.join(arguments)})"]
    return declarations
