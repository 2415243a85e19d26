"""The passes, in order. This list is the whole pipeline; the runner below knows no pass."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Literal

from torch import fx

from xllm_compile.graph_passes.add_rms_norm import add_rms_norm
from xllm_compile.graph_passes.all_reduce_rms_norm import all_reduce_rms_norm
from xllm_compile.graph_passes.canonicalise import canonicalise
from xllm_compile.graph_passes.cost_model import CostModel
from xllm_compile.graph_passes.cube_vector_balance import cube_vector_balance
from xllm_compile.graph_passes.dual_stream import dual_stream
from xllm_compile.graph_passes.last_token_gather import last_token_gather
from xllm_compile.graph_passes.lower_npu import lower_npu
from xllm_compile.graph_passes.merge_linear import merge_linear
from xllm_compile.graph_passes.micro_batch_split import micro_batch_split
from xllm_compile.graph_passes.pack_linear import pack_linear
from xllm_compile.graph_passes.qkv_rope_write import qkv_rope_write
from xllm_compile.graph_passes.quantisation import Quantisation
from xllm_compile.graph_passes.quantise import quantise
from xllm_compile.graph_passes.region import PassReport, RegionGraph
from xllm_compile.graph_passes.silu_mul import silu_mul
from xllm_compile.graph_passes.step_shape import StepShape
from xllm_compile.graph_passes.verify import verify_graph
from xllm_compile.runtime.ops.npu import BLOCK_TOKENS

PassFunction = Callable[[RegionGraph], PassReport]
Numerics = Literal["preserving", "changing"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    name: str
    run: PassFunction
    summary: str
    required_in: str | None = None
    """Regions whose name starts with this must have a match: later stages rely on it."""
    after_split: bool = False
    """Whether steps in halves are split before it runs: it places operators, or replaces what the others look for."""
    numerics: Numerics = "preserving"
    """Whether results stay within rounding of eager's. A changing pass runs only when the user asks for it."""


class RequiredPassError(ValueError):
    """A pass that later stages rely on found nothing to rewrite."""


class PassError(RuntimeError):
    """A pass raised; names the pass, the region and the node it was at. The cause is chained."""


# What every target runs alike.
_CANONICALISE = Pass(name="canonicalise", run=canonicalise, summary="drop copies, views and casts that change nothing")
_SILU_MUL = Pass(name="silu_mul", run=silu_mul, summary="SiLU(gate) * up")
_LAST_TOKEN_GATHER = Pass(
    name="last_token_gather",
    run=last_token_gather,
    summary="norm and head on the rows whose logits are wanted",
    required_in="head",
)
_ADD_RMS_NORM = Pass(name="add_rms_norm", run=add_rms_norm, summary="residual add + RMSNorm")


def cpu_pipeline(
    *,
    tied_weights: frozenset[str] = frozenset(),
    disabled: frozenset[str] = frozenset(),
    quantisation: Quantisation | None = None,
) -> list[Pass]:
    """The pipeline of the CPU target.

    tied_weights: embedding tables that the head shares. disabled: names of passes to leave out; ValueError for an
    unknown or a required one. quantisation: adds the quantise pass, which cannot be left out then.
    """
    if quantisation and quantisation.stored_by and "quantise" in disabled:
        raise ValueError("pass 'quantise' cannot be left out: the checkpoint's weights are quantised already")
    if quantisation and "quantise" in disabled:
        raise ValueError(f"--quantize {quantisation.scheme} asks for the pass 'quantise'; leave out one of the two")
    passes = [
        _CANONICALISE,
        # Before the fusions: they look for the parts of one product.
        Pass(
            name="merge_linear",
            run=merge_linear,
            summary="q, k, v and gate, up as one product each",
            required_in="layer",
        ),
        # Required: the CPU kernels write the cache in the fused operator only.
        Pass(
            name="qkv_rope_write",
            run=qkv_rope_write,
            summary="head norm + rotary embedding + KV write",
            required_in="layer",
        ),
        _SILU_MUL,
        # Before the norm is fused: it moves the gather above the single operators.
        _LAST_TOKEN_GATHER,
        _ADD_RMS_NORM,
        # The last two replace the aten.linear nodes that the patterns above look for; what is quantised is not packed.
        *_quantise(quantisation, tied_weights),
        Pass(
            name="pack_linear",
            run=partial(pack_linear, tied_weights=tied_weights),
            summary="products on packed weights",
            required_in=None if quantisation else "layer",
        ),
    ]
    # Known by name, and off already, where nothing is to be quantised.
    return _without(passes, disabled - {"quantise"}, "the CPU kernels rely on it")


def split_pipeline(*, disabled: frozenset[str] = frozenset()) -> list[Pass]:
    """What runs on copies of all regions, after the target's pipeline, for steps that are run in two halves."""
    if "micro_batch_split" in disabled:
        return []
    # Two passes: what the halves are, and in which order they run.
    passes = [
        Pass(name="micro_batch_split", run=micro_batch_split, summary="two halves of a step's tokens"),
        Pass(name="dual_stream", run=dual_stream, summary="one half computes while the other's sum is on its way"),
    ]
    return [step for step in passes if step.name not in disabled]


_SPLIT_PASSES = frozenset({"micro_batch_split", "dual_stream"})


def npu_pipeline(
    *,
    max_model_len: int,
    max_num_seqs: int = 64,
    disabled: frozenset[str] = frozenset(),
    model: CostModel | None = None,
    step: StepShape | None = None,
) -> list[Pass]:
    """The pipeline of the NPU target; its graphs address the KV of ``max_num_seqs`` sequences of ``max_model_len``.

    model, step: of the device and of the step that cores are balanced for; without them they are not.
    Raises ValueError for an unknown or a required name in ``disabled``.
    """
    blocks_per_seq = -(-max_model_len // BLOCK_TOKENS)
    # One block more: rows of no sequence are written to block 0.
    lower = partial(lower_npu, num_blocks=max_num_seqs * blocks_per_seq + 1, blocks_per_seq=blocks_per_seq)
    passes = [
        _CANONICALISE,
        Pass(name="merge_linear", run=merge_linear, summary="q, k, v and gate, up as one product each"),
        _SILU_MUL,
        _LAST_TOKEN_GATHER,
        _ADD_RMS_NORM,
        # After the split: a sum with a stream of its own overlaps computation instead.
        Pass(
            name="all_reduce_rms_norm",
            run=all_reduce_rms_norm,
            summary="product, sum over the ranks, residual add and RMSNorm",
            after_split=True,
        ),
        # It notes what the lowering makes scopes of.
        *_balance(model, step),
        # Last: it replaces every operator that the patterns above look for.
        Pass(
            name="lower_npu",
            run=lower,
            summary="torch_npu operators, streams, core limits",
            required_in="layer",
            after_split=True,
        ),
    ]
    return _without(passes, disabled, "the graphs need it")


def _balance(model: CostModel | None, step: StepShape | None) -> list[Pass]:
    if model is None or step is None:
        return []
    return [
        Pass(
            name="cube_vector_balance",
            run=partial(cube_vector_balance, model=model, step=step),
            summary="cores for branches that run side by side",
            after_split=True,
        )
    ]


def _without(passes: list[Pass], disabled: frozenset[str], reason: str) -> list[Pass]:
    names = [*(step.name for step in passes), *sorted(_SPLIT_PASSES)]
    unknown = sorted(disabled - {*names})
    if unknown:
        raise ValueError(f"no pass is named {unknown[0]!r}; passes: {', '.join(names)}")
    for step in passes:
        if step.name in disabled and step.required_in:
            raise ValueError(f"pass {step.name!r} cannot be left out: {reason}")
    return [step for step in passes if step.name not in disabled]


def _quantise(quantisation: Quantisation | None, tied_weights: frozenset[str]) -> list[Pass]:
    if quantisation is None:
        return []
    return [
        Pass(
            name="quantise",
            run=partial(quantise, quantisation=quantisation, tied_weights=tied_weights),
            summary=f"weights as {quantisation.label}",
            required_in="layer",
            numerics="changing",
        )
    ]


def run_passes(region: RegionGraph, passes: list[Pass]) -> list[PassReport]:
    """Run the passes on one region in place, verifying the graph before the first and after each.

    Raises PassError when a pass raises, RequiredPassError when a required one matches nothing, GraphVerificationError
    naming the pass that broke the graph.
    """
    verify_graph(region, after="capture")
    reports = []
    for step in passes:
        reports.append(_run_pass(region, step))
        verify_graph(region, after=step.name)
    return reports


def _run_pass(region: RegionGraph, step: Pass) -> PassReport:
    ops_before, program_before = region.op_counts(), region.module.code
    began = time.perf_counter()
    try:
        report = step.run(region)
    except Exception as err:
        node = _node_at(err.__traceback__)
        where = f" at node {node.format_node()}" if node is not None else ""
        way_out = f"leave it out with --disable-pass {step.name}"
        if step.required_in:
            way_out = "nothing can be built without it: please report this line"
        raise PassError(
            f"pass {step.name} failed in region {region.name}{where}: {type(err).__name__}: {err}; {way_out}"
        ) from err
    report.seconds = time.perf_counter() - began
    report.ops_before, report.ops_after = ops_before, region.op_counts()
    if region.module.code != program_before:
        report.program = region.module.code.strip()
    if step.required_in and region.name.startswith(step.required_in) and not report.matches:
        raise RequiredPassError(f"pass {step.name} matched nothing in region {region.name}; skips: {report.skips}")
    return report


def _node_at(traceback: TracebackType | None) -> fx.Node | None:
    """The node a pass was working on when it raised: the last one bound to ``node`` on the way to the error, or to
    any other name where no frame has one."""
    named: fx.Node | None = None
    other: fx.Node | None = None
    while traceback is not None:
        values = traceback.tb_frame.f_locals
        if isinstance(values.get("node"), fx.Node):
            named = values["node"]
        other = next((value for value in values.values() if isinstance(value, fx.Node)), other)
        traceback = traceback.tb_next
    return named or other
