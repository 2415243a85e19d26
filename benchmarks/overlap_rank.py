"""One rank of the overlap measurement: runs prefill steps whole and in halves, and prints what it measured as JSON."""

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xllm_compile.runtime.artifact import Manifest, cpu_kernels, read_manifest
from xllm_compile.runtime.model_runner import CompiledModelRunner
from xllm_compile.runtime.ops import native
from xllm_compile.runtime.step import Step
from xllm_compile.runtime.tensor_parallel import RankConfig, RankGroup
from xllm_compile.runtime.weights import map_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--rank", type=int, required=True, help="whose weights, and the core it is bound to")
    parser.add_argument("--address", help="host:port of rank 0; without it the sum is over this process alone")
    parser.add_argument("--interface", default="")
    parser.add_argument("--tokens", type=int, nargs="+", required=True)
    parser.add_argument("--repeats", type=int, required=True)
    args = parser.parse_args()
    # Everything this process does, gloo's threads included, shares one core.
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[args.rank]})
    torch.set_num_threads(1)
    if args.address is None:
        config = RankConfig(rank=0, world_size=1)
    else:
        config = RankConfig(rank=args.rank, world_size=2, address=args.address, interface=args.interface)
    manifest = read_manifest(args.artifact)
    native.load_kernels(args.artifact / cpu_kernels(args.artifact, manifest).path)
    weights = map_weights(args.artifact / manifest.weights[args.rank].path)
    runners = {
        "whole": _runner(args.artifact, replace(manifest, split_buckets=()), weights),
        "split": _runner(args.artifact, manifest, weights),
    }
    group = RankGroup(config)
    group.connect()
    measured: dict[str, Any] = {}
    for num_tokens in args.tokens:
        step = _prefill(num_tokens)
        seconds: dict[str, list[float]] = {name: [] for name in runners}
        for runner in runners.values():
            runner.execute(step)
        others_cpu_s: dict[str, list[float]] = {name: [] for name in runners}
        for _ in range(args.repeats):
            for name, runner in runners.items():
                began, others = time.perf_counter(), _others_cpu_s()
                runner.execute(step)
                seconds[name].append(time.perf_counter() - began)
                others_cpu_s[name].append(_others_cpu_s() - others)
        measured[str(num_tokens)] = {"seconds": seconds, "others_cpu_s": others_cpu_s}
    largest = _prefill(args.tokens[-1])
    measured["traces"] = {name: _trace(runner, largest) for name, runner in runners.items()}
    print(json.dumps(measured), flush=True)
    group.close()


def _others_cpu_s() -> float:
    """CPU time of every thread but this one: what the collectives take of the core that computes."""
    return time.process_time() - time.thread_time()


def _runner(root: Path, manifest: Manifest, weights: dict[str, torch.Tensor]) -> CompiledModelRunner:
    model, length = manifest.model, manifest.max_num_batched_tokens
    shape = (1, length, 2, model.num_kv_heads, model.head_dim)
    kv_layers = [torch.zeros(shape, dtype=getattr(torch, model.dtype)) for _ in range(model.num_layers)]
    return CompiledModelRunner(
        root, manifest, weights, kv_layers, max_model_len=length, max_num_seqs=1, max_num_batched_tokens=length
    )


def _prefill(num_tokens: int) -> Step:
    """A chunk in the middle of a prompt: embed and layers, no head."""
    counted = np.arange(num_tokens, dtype=np.int32)
    return Step(
        token_ids=counted,
        positions=counted,
        rope_len=np.full(num_tokens, num_tokens, dtype=np.int32),
        seq_start=np.array([0, num_tokens], dtype=np.int32),
        context_len=np.array([num_tokens], dtype=np.int32),
        slot=np.zeros(1, dtype=np.int32),
        logits_at=np.empty(0, dtype=np.int32),
    )


def _trace(runner: CompiledModelRunner, step: Step) -> list[dict[str, Any]]:
    """Operators, starts and waits on the core's lane, collectives on the link's, as torch's profiler saw them.

    It does not see into compiled graphs: this run calls the programs operator by operator, in the order that the
    graphs keep. The runner has no graphs afterwards.
    """
    runner.run_operator_by_operator()
    runner.execute(step)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        runner.execute(step)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    lanes = {"xllm::": "core", "_c10d_functional::": "core", "gloo:": "link"}
    spans = [
        (float(event["ts"]), float(event["dur"]), event["name"], lane)
        for event in events
        for prefix, lane in lanes.items()
        if event.get("ph") == "X" and event["name"].startswith(prefix)
    ]
    origin = min(span[0] for span in spans)
    return [
        {"name": name, "ph": "X", "ts": round(ts - origin, 1), "dur": round(dur, 1), "pid": 0, "tid": lane}
        for ts, dur, name, lane in sorted(spans)
    ]


if __name__ == "__main__":
    main()
