"""NPU target, build time: GE graphs through TorchAir, on the null device, for Ascend 910B and later."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import xxhash

from xllm_compile.graph_passes.cost_model import CostModel
from xllm_compile.graph_passes.micro_batch_split import split_sizes
from xllm_compile.graph_passes.pipeline import Pass, npu_pipeline
from xllm_compile.graph_passes.quantisation import Quantisation
from xllm_compile.graph_passes.step_shape import StepShape
from xllm_compile.machine import cache_dir
from xllm_compile.runtime.program import RegionProgram
from xllm_compile.targets.npu.null_device import ensure_null_device, torch_npu_version

MAX_NUM_SEQS = 64
"""Sequences whose KV the graphs address; xllm-serve runs as many by default."""
# What is ours of the way from a program to a graph.
_COMPILER_SOURCES = ("compile_region.py", "ge_graph.py")


class NpuTargetError(ValueError):
    """This Python cannot compile for the NPU; the message names the next step."""


class NpuLowering:
    """One GE graph (AIR) per region and bucket, every shape fixed; see targets.Lowering for the contract.

    There are no dynamic-shape graphs: GE would schedule their operators from the host. Every step fits the largest
    bucket instead. The head reads rows of that bucket's buffers, of which smaller buckets fill the first.
    """

    graph_suffix = ".air"
    has_kernels = False
    # Nothing serves its artifacts yet, and the head's graphs are the same work again.
    has_pooling = False
    # GE ends a graph when all its streams have.
    sums_leave_region = False

    def check(self) -> None:
        built_for = torch_npu_version().split(".post")[0]
        if built_for != torch.__version__.partition("+")[0]:
            raise NpuTargetError(
                f"torch_npu {torch_npu_version()} does not fit torch {torch.__version__}; install torch=={built_for}"
            )
        ensure_null_device(cache_dir())

    def features(self) -> tuple[str, ...]:
        return ("Ascend910B",)

    def compiler_version(self) -> str:
        return f"torch_npu {torch_npu_version()}"

    def environment(self) -> list[str]:
        sources = b"\0".join(Path(__file__).with_name(name).read_bytes() for name in _COMPILER_SOURCES)
        return [torch.__version__, torch_npu_version(), xxhash.xxh3_128(sources).hexdigest()]

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
        if quantisation is not None and quantisation.stored_by:
            raise ValueError(
                f"checkpoints quantised by {quantisation.stored_by} are for the cpu target; give the npu an unquantised"
                " one"
            )
        if quantisation is not None:
            raise ValueError(f"--quantize {quantisation.scheme} is for the cpu target; leave it out for the npu")
        return npu_pipeline(
            max_model_len=max_model_len, max_num_seqs=MAX_NUM_SEQS, disabled=disabled, model=model, step=step
        )

    def logits_buckets(self, token_buckets: Sequence[int]) -> tuple[int, ...]:
        """One row per sequence that gets a token, up to as many as there can be."""
        return tuple(sorted({min(size, MAX_NUM_SEQS) for size in token_buckets}))

    def graph_sizes(
        self, program: RegionProgram, token_buckets: Sequence[int], logits_buckets: Sequence[int]
    ) -> list[dict[str, int]]:
        if program.name == "head":
            return [{"R": rows, "T": max(token_buckets)} for rows in logits_buckets]
        # Padding rows are a sequence more where all others are there.
        return [{"T": tokens, "S": min(tokens, MAX_NUM_SEQS + 1)} for tokens in token_buckets]

    def halves_sizes(self, program: RegionProgram, num_tokens: int) -> dict[str, int]:
        if program.name.partition(".")[0] == "head":
            # As many rows as there can be: a step in halves has few.
            return {"R": min(num_tokens, MAX_NUM_SEQS), "T": num_tokens, **split_sizes(num_tokens)}
        return {"T": num_tokens, "S": min(num_tokens, MAX_NUM_SEQS + 1), **split_sizes(num_tokens)}

    def worker_environment(self) -> Mapping[str, str]:
        return {
            "LD_LIBRARY_PATH": str(ensure_null_device(cache_dir()).resolve()),
            # torch would import torch_npu before it is set up.
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
            # Warnings about the null device's memory would reach the user.
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }

    def initialise_worker(self, scratch: Path) -> None:
        from xllm_compile.targets.npu.compile_region import initialise

        initialise()

    def compile_program(self, program: RegionProgram, sizes: Mapping[str, int], output: Path) -> None:
        from xllm_compile.targets.npu.compile_region import compile_program

        compile_program(program, sizes, output)

    def build_kernels(self, output: Path) -> None:
        raise AssertionError("the operators of the NPU come with CANN")
