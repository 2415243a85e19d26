"""The benches that are arithmetic only, at a small size: what they write can be read back and adds up."""

from typing import Any

import pytest

from xllm_compile.benchmarks.bench_balance import run_balance
from xllm_compile.benchmarks.bench_buckets import run_buckets
from xllm_compile.benchmarks.bench_cores import CORES, run_cores
from xllm_compile.benchmarks.record import read_record
from xllm_compile.benchmarks.thread_shares import SHARED_CORES
from xllm_compile.request_trace import TraceError

OPTIONS: dict[str, Any] = {"name": "buckets", "model": "qwen3-0.6b", "device": "h200", "max_tokens": 64, "max_seqs": 8}


def test_buckets(tmp_path):
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        "".join(f'{{"timestamp": {40 * i}, "input_length": {90 + i}, "output_length": 30}}\n' for i in range(20))
    )
    run_buckets(trace, tmp_path, ["x"], **OPTIONS)
    record = read_record(tmp_path / "buckets.json")
    raw = record.raw
    assert sum(size * count for size, count in raw["histogram"]) == sum(90 + i + 29 for i in range(20))
    assert all(len(choice["buckets"]) <= raw["num_graphs"] == 7 for choice in raw["choices"].values())
    least = raw["choices"]["fewest padded tokens"]["padded_tokens"]
    assert all(choice["padded_tokens"] >= least for choice in raw["choices"].values())
    assert raw["choices"]["least time"]["step_seconds"] <= raw["choices"]["powers of two"]["step_seconds"] * 1.001


def test_buckets_need_arrival_times(tmp_path):
    (tmp_path / "trace.jsonl").write_text('{"input_length": 90, "output_length": 30}\n')
    with pytest.raises(TraceError, match="no arrival times"):
        run_buckets(tmp_path / "trace.jsonl", tmp_path, ["x"], **OPTIONS)


def test_balance(tmp_path):
    run_balance(tmp_path, ["x"], device="ascend-910c", traces=tmp_path / "traces")
    record = read_record(tmp_path / "cube_vector_balance.json")
    assert len(record.raw["cases"]) == 4 and len(list((tmp_path / "traces").iterdir())) == 8
    for case in record.raw["cases"].values():
        assert case["after"]["seconds"] <= case["before"]["seconds"]
        for when in ("before", "after"):
            assert all(0 <= share <= 1 for share in case[when]["idle_share"].values())
            assert max(end for *_, end in case[when]["nodes"]) == case[when]["seconds"]

    for plans in record.raw["thread_shares"].values():
        assert [int(cores) for cores in plans] == list(SHARED_CORES)
        for cores, plan in plans.items():
            assert sum(plan["cores"]) <= int(cores)
            # Few cores take the bandwidth together: whoever has a share waits for what the others do not take.
            assert int(cores) > 8 or plan["shared_s"] >= plan["in_turns_s"]
    assert all(bar.met is not False for bar in record.bars)


def test_cores(tmp_path):
    run_cores(tmp_path, ["x"], models=("qwen3-0.6b",))
    planned = read_record(tmp_path / "cpu_cores_planned.json").raw["models"]["qwen3-0.6b"]
    prefill, decode = (
        [planned[case][str(cores)] for cores in CORES] for case in ("prefill 512", "decode batch 1, context 128")
    )
    # Products grow with the cores; reading ends at the bandwidth, and starting kernels costs more with each core.
    assert prefill == sorted(prefill, reverse=True) and prefill[0] / prefill[-1] > 40
    assert decode[0] / min(decode) < 12 and decode[-1] > min(decode)
    rates = planned["two nodes"]
    assert rates["weights on one node"] < rates["weights interleaved"] < rates["an instance on each node"]
    assert (tmp_path / "cpu_cores_planned.html").read_text().count("<svg") == 1
