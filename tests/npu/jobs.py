"""What the checks run in a process that has torch_npu on the null device."""

from pathlib import Path
from typing import Any

import torch

from xllm_compile.runtime.ops.npu import SCHEMAS
from xllm_compile.runtime.program import RegionProgram
from xllm_compile.targets.npu import compile_region
from xllm_compile.targets.npu.ge_graph import GeOp


def operator_schemas() -> dict[str, str]:
    """The schemas of torch_npu's own operators, for the names that lowered graphs call."""
    found = {}
    for qualified in SCHEMAS:
        namespace, name = qualified.split("::")
        found[qualified] = str(getattr(getattr(torch.ops, namespace), name).default._schema)
    return found


def compile_ops(program: dict[str, Any], sizes: dict[str, int], output: str) -> list[GeOp]:
    """Compile a program and read back what was written."""
    compile_region.compile_program(RegionProgram.from_json(program), sizes, Path(output))
    return read_ops(output)


def read_ops(path: str) -> list[GeOp]:
    return compile_region.ge_ops(compile_region.read_model(Path(path)).graph[0])
