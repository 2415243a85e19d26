"""What a gateway costs: its CPU time per token and what it adds to each token's way, at many streams at a time."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from xllm_compile.benchmarks.artifacts import artifact_of_demo
from xllm_compile.benchmarks.console import finish, say
from xllm_compile.benchmarks.load import ForeignLoad, wait_quiet
from xllm_compile.benchmarks.openai_client import StreamResult, stream_completion
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.server_process import ServerProcess
from xllm_compile.benchmarks.timing import percentile

_TARGET_TOKENS_PER_S = 2000


def run_gateway(
    work_dir: Path,
    results: Path,
    command: Sequence[str],
    *,
    streams: int,
    instances: int,
    tokens_per_s: float,
    seconds: float,
) -> None:
    """Each stream gets tokens_per_s, with all others of its instance. Writes gateway.json."""
    artifact = artifact_of_demo(work_dir)
    wait_quiet()
    options = ["--role", "gateway", "--registry-port", "0", "--routing", "load", "--max-streams", "4096"]
    with ServerProcess(artifact, options) as gateway:
        gateway.wait_ready()
        arguments = [gateway.registry, str(tokens_per_s), str(instances)]
        instance = subprocess.Popen(
            [sys.executable, "-m", "xllm_compile.benchmarks.paced_instance", *arguments],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert instance.stdout is not None
            if instance.stdout.readline() != "READY\n":
                raise RuntimeError("the paced instance did not start; its message is above")
            with ForeignLoad() as foreign:
                cpu_s, wall_s, answers = asyncio.run(_drive(gateway, streams, round(tokens_per_s * seconds)))
        finally:
            instance.kill()
            instance.wait()
    failed = [answer.error for answer in answers if answer.error is not None]
    num_tokens = sum(len(answer.token_times) for answer in answers)
    ways_s = sorted(way_s for answer in answers for way_s in _ways_s(answer))
    share = cpu_s / num_tokens * _TARGET_TOKENS_PER_S
    say(f"{num_tokens} tokens in {wall_s:.1f} s, {cpu_s:.2f} s of CPU")
    bars = [
        Bar(what=f"one core's share at {_TARGET_TOKENS_PER_S} tokens/s", value=share * 100, unit="%", bar="<= 10"),
        Bar(what="instance to client, median", value=percentile(ways_s, 50) * 1e3, unit="ms"),
        Bar(what="instance to client, p99", value=percentile(ways_s, 99) * 1e3, unit="ms", bar="<= 5"),
        Bar(what="streams that failed", value=len(failed), unit="", bar="<= 0"),
    ]
    raw = {
        "streams": streams,
        "instances": instances,
        "tokens_per_s_each": tokens_per_s,
        "wall_s": wall_s,
        "gateway_cpu_s": cpu_s,
        "tokens": num_tokens,
        "ways_s": {str(percent): percentile(ways_s, percent) for percent in (10, 50, 90, 99, 99.9)},
        "errors": failed[:5],
        "foreign_cores": foreign.cores,
    }
    finish(make_record("gateway", command, seed=0, raw=raw, bars=bars), results)


async def _drive(gateway: ServerProcess, streams: int, num_tokens: int) -> tuple[float, float, list[StreamResult]]:
    """CPU seconds of the gateway, wall seconds, and the streams."""
    requests = (stream_completion(gateway.host, gateway.port, [index + 1] * 16, num_tokens) for index in range(streams))
    cpu_s, began = process_cpu_s(gateway.pid), time.monotonic()
    answers = await asyncio.gather(*requests)
    return process_cpu_s(gateway.pid) - cpu_s, time.monotonic() - began, list(answers)


def _ways_s(answer: StreamResult) -> list[float]:
    """From the instance, which wrote the time into each token, to the client."""
    sent_ns = map(int, answer.text.split())
    return [arrived - sent / 1e9 for arrived, sent in zip(answer.token_times, sent_ns, strict=False)]


def process_cpu_s(pid: int) -> float:
    """User and system time of the process and its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
