"""The simulated engine serves what it is given, and the bench writes a record that can be read back."""

from typing import Any

import pytest

from xllm_compile.benchmarks.bench_schedule import CASES, CLASSES, run_schedule
from xllm_compile.benchmarks.record import read_record
from xllm_compile.benchmarks.schedule_simulation import SimulatedEngine, SimulatedSequence
from xllm_compile.request_trace import TraceError
from xllm_compile.runtime.local_scheduler import SchedulingRules
from xllm_compile.runtime.policies.state import Limits
from xllm_compile.runtime.step_predictor import default_prior

OPTIONS: dict[str, Any] = {
    "name": "schedule",
    "model": "qwen3-0.6b",
    "device": "h200",
    "num_requests": 25,
    "rate": 100.0,
    "kv_tokens": 600,
    "max_tokens": 64,
    "max_seqs": 8,
}


def sequence(number: int, prompt: int, outputs: int) -> SimulatedSequence:
    return SimulatedSequence(
        number=number,
        kind="x",
        arrival_s=0.0,
        num_prompt_tokens=prompt,
        num_outputs_wanted=outputs,
        max_tokens=50,
    )


def test_time_passes_with_the_steps() -> None:
    engine = SimulatedEngine(
        rules=SchedulingRules(),
        limits=Limits(max_num_seqs=2, max_num_batched_tokens=8),
        num_kv_tokens=200,
        prior=default_prior(),
        truth=lambda load: 1.0,
    )
    served = [sequence(0, 8, 3), sequence(1, 4, 1), sequence(2, 201, 1)]
    engine.run(served)
    # Three steps for the first; the second rides in its second one, and the third is larger than the cache.
    assert engine.now == pytest.approx(3.0, rel=0.2)
    assert (served[0].num_outputs, served[1].num_outputs, served[2].num_outputs) == (3, 1, 0)
    assert served[0].ttft_s == pytest.approx(1.0, rel=0.2) and served[0].tpot_s == pytest.approx(1.0, rel=0.2)
    assert served[1].tpot_s is None


def test_the_bench(tmp_path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        "".join(f'{{"timestamp": {40 * i}, "input_length": {90 + i}, "output_length": 20}}\n' for i in range(30))
    )
    run_schedule(trace, tmp_path, ["x"], **OPTIONS)
    raw = read_record(tmp_path / "schedule.json").raw
    assert set(raw["cases"]) == set(CASES)
    for case in raw["cases"].values():
        assert sum(case[kind]["num_served"] for kind in CLASSES) == 25
        assert case["tokens_per_s"] * case["simulated_s"] == pytest.approx(25 * 20)


def test_the_bench_needs_arrival_times(tmp_path) -> None:
    (tmp_path / "trace.jsonl").write_text('{"input_length": 90, "output_length": 30}\n' * 2)
    with pytest.raises(TraceError, match="no arrival times"):
        run_schedule(tmp_path / "trace.jsonl", tmp_path, ["x"], **OPTIONS)
