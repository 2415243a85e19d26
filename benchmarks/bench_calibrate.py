"""Fits the cost model to this machine and states its error on steps it was not fitted to.

Kernels are measured one by one on the model's shapes, each family's efficiency is fitted to its own, then a few whole
steps give what a step costs beside its kernels. The error is that of other steps: other batches, contexts, chunks.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from xllm_compile.benchmarks.artifacts import artifact_of_shape
from xllm_compile.benchmarks.checkpoints import Shape
from xllm_compile.benchmarks.console import finish, say, show_table
from xllm_compile.benchmarks.fit_efficiency import Sample, fit_efficiency, fit_rate
from xllm_compile.benchmarks.kernel_samples import KernelSamples
from xllm_compile.benchmarks.limits import measure_limits
from xllm_compile.benchmarks.load import ForeignLoad, wait_quiet
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.step_timing import Sequences, TimedModel
from xllm_compile.device import calibrated_path
from xllm_compile.graph_passes.cost_model import CostModel
from xllm_compile.graph_passes.device_spec import DeviceSpec, cpu_device_spec, write_device_spec
from xllm_compile.machine import cpu_model
from xllm_compile.models.config import DecoderConfig
from xllm_compile.runtime.isa import isa_features
from xllm_compile.runtime.ops import native
from xllm_compile.runtime.resources import num_cpus

FITTED = ("linear", "attention", "token_wise")
# Steps that the time beside the kernels is taken from.
_FITTED_STEPS: tuple[Sequences, ...] = (((1, 48),), ((1, 256),) * 4, ((1, 640),) * 12, ((48, 48),), ((320, 320),))
HELD_OUT: tuple[Sequences, ...] = (
    *(((1, context),) for context in (64, 500, 2000)),
    ((1, 300),) * 2,
    ((1, 1000),) * 4,
    ((1, 128),) * 8,
    ((1, 1500),) * 8,
    ((1, 200),) * 16,
    ((1, 400),) * 24,
    ((1, 100),) * 32,
    *(((tokens, tokens),) for tokens in (24, 96, 200, 384, 512)),
    ((256, 1280),),
    ((512, 2048),),
    ((120, 120), *((1, 500),) * 8),
    ((500, 500), *((1, 1200),) * 4),
    ((240, 1000), *((1, 256),) * 16),
)


def run_calibrate(
    shape: Shape,
    artifact: Path | None,
    work_dir: Path,
    results: Path,
    command: Sequence[str],
    *,
    seed: int,
    repeats: int,
    output: Path | None,
) -> None:
    """Write the spec (by default where builds look for it) and cost_model_cpu.json."""
    if artifact is None:
        artifact, _ = artifact_of_shape(shape, work_dir, seed=seed)
    quiet = wait_quiet()
    with ForeignLoad() as load:
        model = TimedModel.open(artifact, [*HELD_OUT, *_FITTED_STEPS])
        spec, samples = fit_kernels(artifact, model, repeats)
        spec = fit_steps(model, spec, seed=seed, repeats=repeats)
        steps = [(case, model.measure(case, seed=seed, repeats=repeats)) for case in HELD_OUT]
    path = output or calibrated_path()
    write_device_spec(path, spec)
    say(f"wrote {path}")
    errors = []
    rows, raw_steps = [], []
    for case, measured in steps:
        predicted = model.predict(case, spec)
        errors.append(abs(predicted / measured.median - 1))
        name = step_name(case)
        rows.append(
            (name, f"{measured.median * 1e3:.2f}", f"{predicted * 1e3:.2f}", f"{predicted / measured.median:.2f}")
        )
        raw_steps.append({"step": name, "sequences": case, "predicted_s": predicted, "measured_s": measured.to_json()})
    show_table("Steps the model was not fitted to, ms", ("step", "measured", "predicted", "ratio"), rows)
    built_in = cpu_device_spec(isa_features(), num_cpus())
    uncalibrated = [abs(model.predict(case, built_in) / measured.median - 1) for case, measured in steps]
    bars = [
        Bar(
            what=f"median error of predicted step time over {len(steps)} held-out steps",
            value=statistics.median(errors),
            unit="share",
            bar="<= 0.15",
        ),
        Bar(what="largest error of them", value=max(errors), unit="share"),
        Bar(
            what="median error of the built-in spec, uncalibrated", value=statistics.median(uncalibrated), unit="share"
        ),
    ]
    raw = {
        "artifact": artifact.name,
        "foreign_cores_before": quiet,
        "foreign_cores": load.cores,
        "device_spec": spec.to_json(),
        "steps": raw_steps,
        "kernels": [
            {
                "what": what,
                "cost": asdict(cost),
                "measured_s": seconds,
                "predicted_s": CostModel(spec=spec).seconds(cost),
            }
            for what, (cost, seconds) in samples
        ],
    }
    finish(make_record("cost_model_cpu", command, seed=seed, raw=raw, bars=bars), results)


def fit_kernels(artifact: Path, model: TimedModel, repeats: int) -> tuple[DeviceSpec, list[tuple[str, Sample]]]:
    """The built-in spec with this machine's rates and the efficiencies its kernels show, and what was measured."""
    base = cpu_device_spec(isa_features(), num_cpus())
    say("measuring the limits")
    limits = measure_limits(artifact)
    threads = limits.num_threads
    spec = replace(
        base,
        name=f"{cpu_model()}, {threads} threads",
        sources={
            **base.sources,
            "memory_bytes_per_s": "measured: loads only",
            "core_flops": "measured: best of torch.matmul; int8: fitted to measured kernels",
            "launch_s": "measured: an operator on one token",
            "efficiency": "fitted to measured kernels",
        },
        memory_bytes_per_s=limits.read_gb_per_s * 1e9,
        core_flops={
            **base.core_flops,
            "cube": {
                "bfloat16": limits.bf16_gemm_gflops * 1e9 / base.cores["cube"],
                "float32": limits.f32_gemm_gflops * 1e9 / base.cores["cube"],
            },
        },
    )
    say("measuring kernels")
    config = DecoderConfig.from_json(model.manifest.model_config)
    torch.manual_seed(0)
    kernels = native.Kernels(artifact / "graphs/kernels.so")
    kernels.set_num_threads(threads)
    dtype = getattr(torch, model.manifest.model.dtype)
    measured = KernelSamples(kernels, config, dtype, repeats)
    samples = list(measured.measure())
    one_token = [seconds for what, (_, seconds) in samples if what.endswith(", 1 tokens")]
    spec = replace(spec, launch_s=min(one_token))
    # What takes hardly longer than a launch says nothing of the work in it.
    telling = [sample for _, sample in samples if sample[1] > 3 * spec.launch_s]
    for family in FITTED:
        if not any(cost.family == family for cost, _ in telling):
            say(f"{family} keeps its built-in efficiency: on this model nothing of it takes longer than a launch")
            continue
        found = fit_efficiency(spec, family, telling)
        spec = replace(spec, efficiency={**spec.efficiency, family: found})
    rounded = [(what, sample) for what, sample in measured.rounded_linears() if sample[1] > 3 * spec.launch_s]
    if rounded:
        spec = fit_rate(spec, "int8", [sample for _, sample in rounded])
    else:
        say("int8 keeps the rate of bfloat16: on this model no product takes longer than a launch")
    return spec, [*samples, *rounded]


def fit_steps(model: TimedModel, spec: DeviceSpec, *, seed: int, repeats: int) -> DeviceSpec:
    """What a step takes beside its kernels, and what the dynamic-shape graph takes beside one for the very size."""
    say("measuring steps")
    ratios = []
    for bucket in model.manifest.token_buckets:
        case: Sequences = ((bucket, bucket),)
        exact = model.measure(case, seed=seed, repeats=repeats).median
        ratios.append(model.measure(case, seed=seed, repeats=repeats, is_dynamic=True).median / exact)
    overhead = max(1.0, statistics.median(ratios)) if ratios else spec.dynamic_overhead
    spec = replace(spec, step_overhead_s=0.0, dynamic_overhead=overhead)
    beside = []
    for case in _FITTED_STEPS:
        beside.append(model.measure(case, seed=seed, repeats=repeats).median - model.predict(case, spec))
    return replace(
        spec,
        step_overhead_s=max(0.0, statistics.median(beside)),
        sources={**spec.sources, "step_overhead_s": "measured steps", "dynamic_overhead": "measured steps"},
    )


def step_name(case: Sequences) -> str:
    """ "8 x 1 of 128", "120 of 120 + 8 x 1 of 500": new tokens of how much context, and how often."""
    counts: dict[tuple[int, int], int] = {}
    for sequence in case:
        counts[sequence] = counts.get(sequence, 0) + 1
    return " + ".join(
        f"{f'{count} x ' if count > 1 else ''}{new} of {context}" for (new, context), count in counts.items()
    )
