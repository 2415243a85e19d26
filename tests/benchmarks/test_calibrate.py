"""The fit on samples whose factors are known, and the steps that are timed."""

from dataclasses import replace

import numpy as np
import pytest

from xllm_compile.benchmarks.bench_calibrate import _FITTED_STEPS, HELD_OUT, step_name
from xllm_compile.benchmarks.fit_efficiency import fit_efficiency, fit_rate
from xllm_compile.benchmarks.step_timing import step_of
from xllm_compile.graph_passes.cost_model import CostModel, NodeCost
from xllm_compile.graph_passes.device_spec import Efficiency, cpu_device_spec

SPEC = cpu_device_spec(("amx_bf16", "amx_tile"), 2)


def products():
    for inner, columns in ((1024, 4096), (2048, 1024), (3072, 1024)):
        for rows in (1, 4, 16, 17, 64, 256, 512):
            yield NodeCost(
                unit="cube",
                family="linear",
                dtype="bfloat16",
                flops=2.0 * rows * inner * columns,
                flops_per_row=2.0 * inner * columns,
                bytes_read=2.0 * inner * (columns + rows),
                bytes_cold=2.0 * inner * columns,
                bytes_written=2.0 * rows * columns,
            )


@pytest.mark.parametrize(
    "truth",
    [
        Efficiency(compute=0.62, memory=0.8, half_rows=9.0, row_tile=16, overlap=0.9),
        Efficiency(compute=0.1, memory=0.3, half_rows=2.0, row_tile=16, overlap=0.5),
    ],
)
def test_known_factors_are_found_again(truth):
    known = CostModel(spec=replace(SPEC, efficiency={"linear": truth}))
    samples = [(cost, known.seconds(cost)) for cost in products()]
    found = fit_efficiency(SPEC, "linear", samples)
    assert found.row_tile == 16
    fitted = CostModel(spec=replace(SPEC, efficiency={"linear": found}))
    for cost, seconds in samples:
        assert fitted.seconds(cost) == pytest.approx(seconds, rel=0.05)


def test_a_tenth_of_noise_moves_the_fit_by_less():
    truth = SPEC.efficiency["linear"]
    known = CostModel(spec=SPEC)
    noise = np.random.default_rng(0).normal(0, 0.1, 21)
    samples = [(cost, known.seconds(cost) * float(np.exp(n))) for cost, n in zip(products(), noise, strict=True)]
    found = fit_efficiency(replace(SPEC, efficiency={"linear": Efficiency(row_tile=16)}), "linear", samples)
    assert found.compute == pytest.approx(truth.compute, rel=0.1) and found.memory == pytest.approx(
        truth.memory, rel=0.1
    )


def test_the_rate_of_int8_is_found_beside_launches_and_moves():
    truth = 3 * SPEC.core_flops["cube"]["bfloat16"]
    cube = {**SPEC.core_flops["cube"], "int8": truth}
    known = CostModel(spec=replace(SPEC, core_flops={**SPEC.core_flops, "cube": cube}))
    costs = [replace(cost, dtype="int8") for cost in products() if cost.flops / cost.flops_per_row >= 64]
    found = fit_rate(SPEC, "int8", [(cost, known.seconds(cost)) for cost in costs])
    assert found.core_flops["cube"]["int8"] == pytest.approx(truth, rel=0.01)
    assert found.peak_flops("cube", "bfloat16") == SPEC.peak_flops("cube", "bfloat16")
    with pytest.raises(ValueError, match="the rate of int8 needs samples"):
        fit_rate(SPEC, "int8", [])


def test_a_family_needs_samples():
    cost = next(iter(products()))
    for samples in ([], [(cost, 0.0)]):
        with pytest.raises(ValueError, match="family linear needs samples"):
            fit_efficiency(SPEC, "linear", samples)


def test_held_out_steps_are_twenty_and_none_is_fitted():
    assert len(set(HELD_OUT)) == 20 and not set(HELD_OUT) & set(_FITTED_STEPS)
    kinds = {(any(new == 1 for new, _ in case), any(new > 1 for new, _ in case)) for case in HELD_OUT}
    assert kinds == {(True, False), (False, True), (True, True)}


def test_the_step_of_sequences():
    step = step_of(((3, 5), (1, 8)), 100, seed=0)
    assert step.positions.tolist() == [2, 3, 4, 7] and step.seq_start.tolist() == [0, 3, 4]
    assert step.context_len.tolist() == [5, 8] and step.slot.tolist() == [0, 1] and step.logits_at.tolist() == [2, 3]
    assert step.rope_len.tolist() == [5, 5, 5, 8] and step.token_ids.max() < 100
    assert step_name(((120, 120), (1, 500), (1, 500))) == "120 of 120 + 2 x 1 of 500"
