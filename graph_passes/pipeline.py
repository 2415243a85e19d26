"""The passes, in order. This list is the whole pipeline; the runner below knows no pass."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from xllm_compile.graph_passes.add_rms_norm import add_rms_norm
from xllm_compile.graph_passes.canonicalise import canonicalise
from xllm_compile.graph_passes.last_token_gather import last_token_gather
from xllm_compile.graph_passes.merge_linear import merge_linear
from xllm_compile.graph_passes.pack_linear import pack_linear
from xllm_compile.graph_passes.qkv_rope_write import qkv_rope_write
from xllm_compile.graph_passes.region import PassReport, RegionGraph
from xllm_compile.graph_passes.silu_mul import silu_mul
from xllm_compile.graph_passes.verify import verify_graph

PassFunction = Callable[[RegionGraph], PassReport]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    name: str
    run: PassFunction
    summary: str
    required_in: str | None = None
    """Regions whose name starts with this must have a match: later stages rely on it."""


class RequiredPassError(ValueError):
    """A pass that later stages rely on found nothing to rewrite."""


def cpu_pipeline(*, tied_weights: frozenset[str] = frozenset(), disabled: frozenset[str] = frozenset()) -> list[Pass]:
    """The pipeline of the CPU target.

    tied_weights: embedding tables that the head shares. disabled: names of passes to leave out; ValueError for an
    unknown or a required one.
    """
    passes = [
        Pass(name="canonicalise", run=canonicalise, summary="drop copies, views and casts that change nothing"),
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
        Pass(name="silu_mul", run=silu_mul, summary="SiLU(gate) * up"),
        # Before the norm is fused: it moves the gather above the single operators.
        Pass(
            name="last_token_gather",
            run=last_token_gather,
            summary="norm and head on the rows whose logits are wanted",
            required_in="head",
        ),
        Pass(name="add_rms_norm", run=add_rms_norm, summary="residual add + RMSNorm"),
        # Last: it replaces the aten.linear nodes that the patterns above look for.
        Pass(
            name="pack_linear",
            run=partial(pack_linear, tied_weights=tied_weights),
            summary="products on packed weights",
            required_in="layer",
        ),
    ]
    unknown = sorted(disabled - {step.name for step in passes})
    if unknown:
        raise ValueError(f"no pass is named {unknown[0]!r}; passes: {', '.join(step.name for step in passes)}")
    for step in passes:
        if step.name in disabled and step.required_in:
            raise ValueError(f"pass {step.name!r} cannot be left out: the CPU kernels rely on it")
    return [step for step in passes if step.name not in disabled]


def run_passes(region: RegionGraph, passes: list[Pass]) -> list[PassReport]:
    """Run the passes on one region in place, verifying the graph before the first and after each.

    Raises RequiredPassError when a required pass matches nothing, GraphVerificationError naming the pass that
    broke the graph.
    """
    verify_graph(region, after="capture")
    reports = []
    for step in passes:
        report = step.run(region)
        verify_graph(region, after=step.name)
        if step.required_in and region.name.startswith(step.required_in) and not report.matches:
            raise RequiredPassError(f"pass {step.name} matched nothing in region {region.name}; skips: {report.skips}")
        reports.append(report)
    return reports
