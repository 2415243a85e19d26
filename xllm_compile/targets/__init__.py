"""Build-time halves of the targets: what is asked of one, and which there are."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from xllm_compile.graph_passes.cost_model import CostModel
from xllm_compile.graph_passes.pipeline import Pass
from xllm_compile.graph_passes.quantisation import Quantisation
from xllm_compile.graph_passes.step_shape import StepShape
from xllm_compile.runtime.program import RegionProgram

TARGETS = ("cpu", "npu")
# Of targets that plans and memory code know already.
_MISSING = {"cuda": ": it has device specs to plan with, but neither kernels nor a lowering"}


class UnsupportedOperatorError(ValueError):
    """A region uses operators that compiled graphs cannot call; ``operators`` names them ("aten::x")."""

    def __init__(self, operators: tuple[str, ...]) -> None:
        super().__init__(operators)
        self.operators = operators

    def __str__(self) -> str:
        return f"no lowering for the target: {', '.join(self.operators)}"


class Lowering(Protocol):
    """How one target turns regions into code. Stateless: worker processes make their own by name."""

    graph_suffix: str
    """Ending of a compiled graph's file name."""
    has_kernels: bool
    """Whether the artifact carries a library of our own kernels, which ``build_kernels`` makes."""

    sums_leave_region: bool
    """Whether a graph can end before its sums over the ranks have arrived, so that the next one hides them."""

    has_pooling: bool
    """Whether its artifacts hold the region that embeddings are pooled from."""

    def check(self) -> None:
        """Raise a ValueError or RuntimeError that names the next step when this machine cannot compile for the
        target."""

    def features(self) -> tuple[str, ...]:
        """What the device must have to run the graphs."""

    def compiler_version(self) -> str:
        """The compiler that code depends on beside torch."""

    def environment(self) -> list[str]:
        """What a graph's bytes depend on beside its program and sizes; part of its key."""

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
        """The passes, in order. ``model`` and ``step``, the largest that runs, are for those that ask what pays.
        ValueError for an unknown or required name in ``disabled``, and for a quantisation that the target or the model
        does not allow."""

    def logits_buckets(self, token_buckets: Sequence[int]) -> tuple[int, ...]:
        """Numbers of logits rows with a head graph of their own."""

    def graph_sizes(
        self, program: RegionProgram, token_buckets: Sequence[int], logits_buckets: Sequence[int]
    ) -> list[dict[str, int]]:
        """The symbols each graph of a region fixes; an empty dict is the dynamic-shape graph."""

    def halves_sizes(self, program: RegionProgram, num_tokens: int) -> dict[str, int]:
        """The symbols that the graph of a bucket fixes for a region on two halves of a step."""

    def worker_environment(self) -> Mapping[str, str]:
        """Environment variables the compiling processes start with."""

    def initialise_worker(self, scratch: Path) -> None:
        """Once in each compiling process, before its first graph. ``scratch`` is deleted after the build."""

    def compile_program(self, program: RegionProgram, sizes: Mapping[str, int], output: Path) -> None:
        """Compile one region for one bucket to ``output``, which is written whole or not at all."""

    def build_kernels(self, output: Path) -> None:
        """Compile the kernels to ``output``; only where ``has_kernels``."""


def lowering_for(target: str) -> Lowering:
    """Raises ValueError for a target that is not built."""
    if target == "cpu":
        from xllm_compile.targets.cpu import CpuLowering

        return CpuLowering()
    if target == "npu":
        from xllm_compile.targets.npu.lowering import NpuLowering

        return NpuLowering()
    raise unknown_target(target)


def unknown_target(target: str) -> ValueError:
    """The error for a target that is not in TARGETS."""
    return ValueError(f"target {target!r} is not built yet{_MISSING.get(target, '')}; available: {', '.join(TARGETS)}")
