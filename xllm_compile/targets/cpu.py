"""CPU target, build time: AOTInductor code around our own C++ kernels."""

import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from xllm_compile.build_key import compiler_version
from xllm_compile.graph_jobs import bucket_sizes
from xllm_compile.graph_passes.cost_model import CostModel
from xllm_compile.graph_passes.micro_batch_split import split_sizes
from xllm_compile.graph_passes.pipeline import Pass, cpu_pipeline
from xllm_compile.graph_passes.quantisation import Quantisation
from xllm_compile.graph_passes.step_shape import StepShape
from xllm_compile.runtime.isa import isa_features
from xllm_compile.runtime.ops import native
from xllm_compile.runtime.ops.spec import TP_GROUP
from xllm_compile.runtime.program import RegionProgram, concrete_shape
from xllm_compile.targets import UnsupportedOperatorError

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
_MAX_LOGITS_BUCKET = 8


class CpuLowering:
    """AOTInductor libraries that call the kernels through the C shim; see targets.Lowering for the contract."""

    graph_suffix = ".so"
    has_kernels = True
    has_pooling = True
    sums_leave_region = True

    def check(self) -> None:
        compiler_version()

    def features(self) -> tuple[str, ...]:
        return isa_features()

    def compiler_version(self) -> str:
        return compiler_version()

    def environment(self) -> list[str]:
        return [
            repr(isa_features()),
            torch.__version__,
            compiler_version(),
            json.dumps(inductor_options(has_collectives=True), sort_keys=True, default=str),
        ]

    def pipeline(
        self,
        *,
        tied_weights: frozenset[str],
        max_model_len: int,
        disabled: frozenset[str],
        quantisation: Quantisation | None,
        model: CostModel,
        step: StepShape,
    ) -> list[Pass]:
        return cpu_pipeline(tied_weights=tied_weights, disabled=disabled, quantisation=quantisation)

    def logits_buckets(self, token_buckets: Sequence[int]) -> tuple[int, ...]:
        # The head runs on one row per sequence that gets a token: decode batch sizes.
        return tuple(size for size in token_buckets if size <= _MAX_LOGITS_BUCKET)

    def graph_sizes(
        self, program: RegionProgram, token_buckets: Sequence[int], logits_buckets: Sequence[int]
    ) -> list[dict[str, int]]:
        """The dynamic graph of each region, and one per bucket where shapes matter."""
        if program.name == "head":
            return [{}, *({"R": rows} for rows in logits_buckets)]
        if program.name in ("embed", "pool"):
            return [{}]
        return [{}, *(bucket_sizes(program, tokens) for tokens in token_buckets)]

    def halves_sizes(self, program: RegionProgram, num_tokens: int) -> dict[str, int]:
        """The head keeps its rows dynamic."""
        symbols = {symbol for spec in program.inputs for symbol in spec.shape if isinstance(symbol, str)}
        known = {"T": num_tokens, "S": num_tokens, "S1": num_tokens + 1, **split_sizes(num_tokens)}
        # T names the bucket also where no input has that many rows.
        return {name: size for name, size in known.items() if name in symbols or name == "T"}

    def worker_environment(self) -> Mapping[str, str]:
        return {}

    def initialise_worker(self, scratch: Path) -> None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(scratch)
        from torch._inductor import config

        # Each worker compiles for itself; inductor's own pool of compile processes would only add more.
        torch.set_num_threads(1)
        config.compile_threads = 1

    def compile_program(self, program: RegionProgram, sizes: Mapping[str, int], output: Path) -> None:
        compile_program(program, sizes, output)

    def build_kernels(self, output: Path) -> None:
        native.build_kernels(output)


def inductor_options(*, has_collectives: bool = False) -> dict[str, Any]:
    """Options of every compilation; part of each graph's cache key."""
    # These two move operators towards their readers. Where a collective is started and where it is waited for is the
    # passes' decision.
    kept_order = {"reorder_for_locality": False, "reorder_for_peak_memory": False}
    return {
        # The wrapper is a sequence of calls: optimising it harder costs compile time and gains nothing that shows.
        "aot_inductor.compile_wrapper_opt_level": "O1",
        # Inductor would compile and run a probe per instruction set, ten seconds in all; /proc/cpuinfo says the same.
        "cpp.vec_isa_ok": True,
        # What runs between our kernels is small: a barrier among threads costs more than it, and on a machine whose
        # cores are taken it waits for a whole scheduler slice (30 ms for a graph of 5 us).
        "cpp.threads": 1,
        **(kept_order if has_collectives else {}),
    }


def compile_program(program: RegionProgram, sizes: Mapping[str, int], output: Path) -> None:
    """Compile one region for one bucket to a shared library at ``output``.

    ``sizes`` fixes symbols (T, S, R, ...); symbols it leaves out stay dynamic. Runs in a build process of its own:
    torch.export and inductor are imported here. Raises whatever they raise; ``output`` is written whole or not at all.
    """
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
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".inductor-") as scratch, _traced_group(program):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = scratch
        from torch._inductor import aoti_compile_and_package

        package = aoti_compile_and_package(
            exported,
            package_path=str(Path(scratch) / "graph.pt2"),
            inductor_configs={
                **inductor_options(has_collectives=program.has_collectives),
                "aot_inductor.custom_ops_to_c_shims": shim_declarations(),
            },
        )
        with zipfile.ZipFile(package) as archive:
            if unsupported := _operators_without_lowering(archive):
                raise UnsupportedOperatorError(unsupported)
            (library,) = [name for name in archive.namelist() if name.endswith(".so")]
            unpacked = Path(scratch) / output.name
            with archive.open(library) as source, unpacked.open("wb") as target:
                shutil.copyfileobj(source, target)
        os.replace(unpacked, output)


def _operators_without_lowering(package: zipfile.ZipFile) -> tuple[str, ...]:
    """Operators that the graph would hand to a proxy executor, which serving does not have: AOTInductor lists them
    beside the library."""
    names: set[str] = set()
    for file in package.namelist():
        if file.endswith(".wrapper.json"):
            names |= {entry["node"]["target"] for entry in json.loads(package.read(file))["nodes"]}
    return tuple(sorted(names))


@contextmanager
def _traced_group(program: RegionProgram) -> Iterator[None]:
    """A process group that nobody meets, for a program with collectives: inductor asks for its size when it prints
    the graph. The size goes nowhere: one library serves every rank."""
    if not program.has_collectives:
        yield
        return
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore, _register_process_group, _unregister_process_group
    from torch.distributed.distributed_c10d import GroupName

    # Only this variable keeps the group: the registry holds weak references.
    group = dist.ProcessGroup(HashStore(), 0, 2)
    _register_process_group(GroupName(TP_GROUP), group)
    try:
        yield
    finally:
        _unregister_process_group(GroupName(TP_GROUP))


def shim_declarations() -> dict[Any, list[str]]:
    """C declarations of the kernels, from the operators' schemas: compiled graphs call them directly."""
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
