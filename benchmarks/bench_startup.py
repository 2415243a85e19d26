"""Start-up: from starting the xllm-serve process to the first streamed token, against ``import torch`` alone."""

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

from xllm_compile.benchmarks.artifacts import artifact_of_shape
from xllm_compile.benchmarks.checkpoints import Shape
from xllm_compile.benchmarks.console import finish, say, show_table
from xllm_compile.benchmarks.load import ForeignLoad, wait_quiet
from xllm_compile.benchmarks.openai_client import stream_completion
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.server_process import ServerProcess, import_seconds
from xllm_compile.benchmarks.timing import summarise

_PROMPT_TOKENS = 32
_OUTPUT_TOKENS = 4


def run_startup(
    shape: Shape, work_dir: Path, results: Path, command: Sequence[str], *, seed: int, repeats: int
) -> None:
    """Measure and write startup.json. The first round warms the disk cache and does not count."""
    artifact, _ = artifact_of_shape(shape, work_dir, seed=seed)
    prompt = [random.Random(seed).randrange(shape.num_words) for _ in range(_PROMPT_TOKENS)]
    parts: dict[str, list[float]] = {
        "process start to first token": [],
        "  process start to ready line": [],
        "    of it by the server's own clock": [],
        "  request to first token": [],
        "python -c 'import torch'": [],
    }
    foreign = []
    for index in range(-1, repeats):
        wait_quiet()
        with ForeignLoad() as load:
            first, ready, own, ttft = _start_once(artifact, prompt)
        torch_s = import_seconds("torch")
        if index < 0:
            continue
        for values, seconds in zip(parts.values(), (first, ready, own, ttft, torch_s), strict=True):
            values.append(seconds)
        foreign.append(load.cores)
        say(f"start {index + 1} of {repeats}: {first:.2f} s, import torch {torch_s:.2f} s")
    summaries = {name: summarise(values) for name, values in parts.items()}
    rows = [(name, *(f"{value:.2f}" for value in (s.median, s.min, s.max))) for name, s in summaries.items()]
    show_table(f"xllm-serve, {shape.name}", ("", "median s", "min s", "max s"), rows)
    raw = {
        "shape": shape.hf_config(),
        "prompt_tokens": _PROMPT_TOKENS,
        "seconds": {name.strip(): summary.to_json() for name, summary in summaries.items()},
        "foreign_cores": foreign,
    }
    whole, torch_alone = (list(summaries.values())[index].median for index in (0, -1))
    bars = [
        Bar(what="process start to first streamed token", value=whole, unit="s", bar="<= 2"),
        Bar(what="of it, beyond import torch", value=whole - torch_alone, unit="s"),
    ]
    finish(make_record("startup", command, seed=seed, raw=raw, bars=bars), results)


def _start_once(artifact: Path, prompt: list[int]) -> tuple[float, float, float, float]:
    """Seconds: start to first token, start to ready, the same by the server's clock, request to first token."""
    with ServerProcess(artifact) as server:
        server.wait_ready()
        result = asyncio.run(stream_completion(server.host, server.port, prompt, _OUTPUT_TOKENS))
        if result.error is not None:
            raise RuntimeError(f"the first request failed: {result.error}")
        first = result.token_times[0]
        return first - server.started, server.ready_s, server.startup_s, result.ttft_s
