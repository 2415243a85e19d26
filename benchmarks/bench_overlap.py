"""How much of the communication of a tensor-parallel prefill step is hidden by running it in two halves.

Two ranks, one core each, over a veth pair between two network namespaces whose rate a token bucket limits. Exposed
communication is a step's time over that link less its time with the collectives summing over one rank alone: the same
graphs, both ranks at work side by side. gloo's threads and the kernel's TCP work share the rank's core: what they take
of it is exposed, not hidden.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xllm_compile.benchmarks.artifacts import compile_model
from xllm_compile.benchmarks.checkpoints import Shape, checkpoint
from xllm_compile.benchmarks.console import finish, say, show_table
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.device import choose_device
from xllm_compile.runtime.artifact import Manifest, read_manifest

_RANKS = (0, 1)
_PORT = 29417


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a rank runs: behind ``command``, talking over ``interface``; without one, alone."""

    command: tuple[str, ...] = ()
    interface: str = ""


_HERE = (Place(), Place())
_TIMEOUT_S = 600


def run_overlap(
    shape: Shape,
    work_dir: Path,
    results: Path,
    command: Sequence[str],
    *,
    seed: int,
    tokens: int,
    small_tokens: int,
    repeats: int,
    share: float,
) -> None:
    """Measure and write overlap_tp2.json and the traces. ``share``: of communication in an unsplit step, in (0, 1)."""
    _check_system()
    # The vocabulary takes no part in what is measured: the step ends before the head.
    small_head = replace(shape, vocab_size=1024, num_words=1000, name=f"{shape.name}-small-head")
    model_dir = checkpoint(small_head, work_dir, seed=seed)
    sizes = [small_tokens, tokens]
    whole = work_dir / "artifacts" / f"{small_head.name}-tp2-whole.xllm"
    _compile(model_dir, whole, sizes, ["--disable-pass", "micro_batch_split"])
    say("measuring the step without a link")
    alone = _run_ranks(whole, _HERE, [tokens], repeats)
    compute_s = _median(alone, tokens, "whole")
    sent = 2 * shape.num_layers * tokens * shape.hidden_size * 4
    link_s = compute_s * share / (1 - share)
    rate = sent / link_s
    spec = work_dir / "overlap-spec.json"
    # One core a rank, and the link that is about to be made.
    built_in = choose_device("cpu", None).spec
    spec.write_text(json.dumps({**built_in.to_json(), "name": "overlap", "link_bytes_per_s": rate}))
    output = work_dir / "artifacts" / f"{small_head.name}-tp2.xllm"
    _compile(model_dir, output, sizes, ["--device-spec", str(spec)])
    manifest = read_manifest(output)
    say(f"link of {rate * 8 / 1e6:.0f} Mbit/s; steps in halves at {list(manifest.split_buckets)} tokens")
    computing = _run_ranks(output, _HERE, sizes, repeats)
    with _namespaces(rate) as ranks:
        linked = _run_ranks(output, ranks, sizes, repeats)
    _report(manifest, computing, linked, sizes, results, command, seed=seed, rate=rate, shape=shape)


def _report(
    manifest: Manifest,
    computing: list[dict[str, Any]],
    linked: list[dict[str, Any]],
    sizes: list[int],
    results: Path,
    command: Sequence[str],
    *,
    seed: int,
    rate: float,
    shape: Shape,
) -> None:
    rows, cases = [], {}
    for size in sizes:
        figures = {}
        for name in ("whole", "split"):
            compute_s, step_s = _median(computing, size, name), _median(linked, size, name)
            figures[name] = {"compute_s": compute_s, "step_s": step_s, "exposed_s": step_s - compute_s}
            values = (f"{1e3 * figures[name][key]:.2f}" for key in ("step_s", "compute_s", "exposed_s"))
            rows.append((str(size), name if size in manifest.split_buckets else f"{name} (declined)", *values))
        cases[str(size)] = figures
    show_table("prefill step, two ranks, ms", ("tokens", "how", "step", "computing", "exposed"), rows)
    largest = cases[str(sizes[-1])]
    hidden = 1 - largest["split"]["exposed_s"] / largest["whole"]["exposed_s"]
    traces = results / "traces"
    traces.mkdir(parents=True, exist_ok=True)
    for name in ("whole", "split"):
        events = linked[0]["traces"][name]
        (traces / f"overlap_tp2_{name}.json").write_text(json.dumps({"traceEvents": events}) + "\n")
    decisions = [entry for entry in manifest.passes if entry["region"] == "buckets"]
    raw = {
        "shape": shape.hf_config(),
        "link_bytes_per_s": rate,
        "split_buckets": list(manifest.split_buckets),
        "decisions": decisions,
        "exposed": "median step over the link less median step of the same graphs summing over one rank, rank 0",
        "cases": cases,
        **{
            key: {
                kind: [{str(size): rank[str(size)][key] for size in sizes} for rank in runs]
                for kind, runs in (("computing", computing), ("linked", linked))
            }
            for key in ("seconds", "others_cpu_s")
        },
    }
    taken = {name: 1e3 * statistics.median(linked[0][str(sizes[-1])]["others_cpu_s"][name]) for name in largest}
    exposed = {name: 1e3 * largest[name]["exposed_s"] for name in largest}
    bars = [
        Bar(what="communication hidden", value=100 * hidden, unit="%", bar=">= 75"),
        Bar(what="exposed communication of a step, whole", value=exposed["whole"], unit="ms"),
        Bar(what="exposed communication of a step, in halves", value=exposed["split"], unit="ms"),
        # One core computes and carries out the sums: this part cannot be hidden.
        Bar(what="CPU time that the sums' threads took of a step in halves", value=taken["split"], unit="ms"),
        Bar(
            what="communication in the unsplit step",
            value=100 * largest["whole"]["exposed_s"] / largest["whole"]["step_s"],
            unit="%",
        ),
        Bar(
            what="step in halves against whole, both over the link",
            value=largest["split"]["step_s"] / largest["whole"]["step_s"],
            unit="x",
            bar="< 1",
        ),
    ]
    finish(make_record("overlap_tp2", command, seed=seed, raw=raw, bars=bars), results)


def _check_system() -> None:
    if os.geteuid() != 0:
        raise RuntimeError("network namespaces need root; run xllm-bench overlap as root")
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        raise RuntimeError(f"{' and '.join(missing)} not found; install iproute2 (Debian: apt-get install iproute2)")
    if len(os.sched_getaffinity(0)) < len(_RANKS):
        raise RuntimeError("one core is not enough: each rank needs its own")


def _compile(model_dir: Path, output: Path, sizes: Sequence[int], options: Sequence[str]) -> None:
    buckets = ",".join(map(str, sizes))
    fixed = ["--dtype", "float32", "--tensor-parallel-size", "2", "--buckets", buckets]
    limits = ["--max-num-batched-tokens", str(max(sizes)), "--max-model-len", str(max(sizes))]
    compile_model(model_dir, output, [*fixed, *limits, *options])


@contextmanager
def _namespaces(rate: float) -> Iterator[list[Place]]:
    """Two namespaces joined by a veth pair of ``rate`` bytes per second each way; commands to run inside each."""
    names = [f"xllm-overlap-{os.getpid()}-{rank}" for rank in _RANKS]
    ends = [f"xo{os.getpid() % 100000}v{rank}" for rank in _RANKS]
    try:
        for name in names:
            _system("ip", "netns", "add", name)
        peer = ["type", "veth", "peer", "name", ends[1], "netns", names[1]]
        _system("ip", "link", "add", ends[0], "netns", names[0], *peer)
        for rank, (name, end) in enumerate(zip(names, ends, strict=True)):
            inside = ["ip", "-n", name]
            _system(*inside, "addr", "add", f"10.201.77.{rank + 1}/24", "dev", end)
            _system(*inside, "link", "set", end, "up")
            _system(*inside, "link", "set", "lo", "up")
            # Bucket of 2 ms: smooth enough for sums of megabytes; the queue holds all that TCP has under way.
            burst = max(65536, int(rate * 0.002))
            limits = ["rate", f"{int(rate * 8)}bit", "burst", str(burst), "latency", "400ms"]
            _system("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", end, "root", "tbf", *limits)
        yield [
            Place(command=("ip", "netns", "exec", name), interface=end) for name, end in zip(names, ends, strict=True)
        ]
    finally:
        for name in names:
            # The pair goes with either namespace.
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _system(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}; network namespaces must be allowed here")


def _run_ranks(artifact: Path, places: Sequence[Place], sizes: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """What each rank measured, both at work at the same time; over a link where they have an interface."""
    processes = []
    try:
        for rank, place in enumerate(places):
            ours = [sys.executable, "-m", "xllm_compile.benchmarks.overlap_rank", str(artifact), "--rank", str(rank)]
            address = ["--address", f"10.201.77.1:{_PORT}", "--interface", place.interface] if place.interface else []
            counts = ["--repeats", str(repeats), "--tokens", *map(str, sizes)]
            processes.append(
                subprocess.Popen([*place.command, *ours, *address, *counts], stdout=subprocess.PIPE, text=True)
            )
        outputs = [process.communicate(timeout=_TIMEOUT_S)[0] for process in processes]
        failed = [rank for rank, process in enumerate(processes) if process.returncode != 0]
        if failed:
            raise RuntimeError(f"rank {failed[0]} ended with exit code {processes[failed[0]].returncode}; see above")
        return [json.loads(output.splitlines()[-1]) for output in outputs]
    finally:
        for process in processes:
            process.kill()


def _median(runs: list[dict[str, Any]], size: int, name: str) -> float:
    """Of rank 0; the ranks meet at every collective."""
    return float(statistics.median(runs[0][str(size)]["seconds"][name]))
