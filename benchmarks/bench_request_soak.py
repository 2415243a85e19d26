"""Thousands of mixed requests with clients that leave, against a real server: nothing leaks, and nobody's answer is
another one than a clean server gives to the same request alone."""

import asyncio
import json
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xllm_compile.benchmarks.artifacts import compile_model
from xllm_compile.benchmarks.console import finish, say, show_table
from xllm_compile.benchmarks.parity import DEMO_MODEL
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.server_process import ServerProcess

_CONCURRENCY = 48
_MAX_MODEL_LEN = 512
# Less than the open requests need at their longest, and some may take the places of others: preemption and eviction
# belong to the mix. What is swapped out has room for a few sequences only, so that others are computed again.
# Graphs that are compiled while serving take memory that is no leak; xllm-bench soak looks at those.
_SERVER_OPTIONS = (
    *("--max-num-seqs", "32", "--max-model-len", str(_MAX_MODEL_LEN), "--kv-memory", "10MiB"),
    *("--scheduling-policy", "priority", "--kv-swap-memory", "1MiB"),
    "--no-graph-promotion",
)
_CLEAN_OPTIONS = (*_SERVER_OPTIONS, "--no-async-scheduling")
_SAMPLES = 40
_MIB = 1 << 20
_WORDS = (
    "def",
    "return",
    "self",
    "for",
    "in",
    "range",
    "if",
    "else",
    "import",
    "class",
    "None",
    "x",
    "=",
    "(",
    ")",
    ":",
)
_PREFIXES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedSoakRequest:
    """One request, and after how many events of its stream its client leaves; None stays."""

    body: dict[str, Any]
    leaves_after: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """Of the server's process."""

    num_done: int
    """Requests before it was taken."""
    memory_bytes: int
    """Anonymous and shared memory that is present; a page of the KV cache counts once, wherever it is mapped."""
    num_files: int
    num_mappings: int


def plan_requests(count: int, seed: int) -> list[PlannedSoakRequest]:
    """Greedy and seeded only, so that every answer is determined by its request."""
    rng = random.Random(seed)
    prefixes = [_text(rng, 120) for _ in range(_PREFIXES)]
    return [_plan_one(rng, prefixes) for _ in range(count)]


def _plan_one(rng: random.Random, prefixes: Sequence[str]) -> PlannedSoakRequest:
    shared = rng.choice(prefixes) if rng.random() < 0.5 else ""
    num_words = min(int(rng.lognormvariate(2.5, 1.0)) + 1, 120)
    body: dict[str, Any] = {
        "prompt": shared + _text(rng, num_words),
        "max_tokens": min(int(rng.lognormvariate(2.8, 0.8)) + 1, 120),
        "stream": rng.random() < 0.7,
    }
    if rng.random() < 0.5:
        body["temperature"] = 0
    else:
        body |= {"temperature": 0.8, "seed": rng.randrange(1 << 30), "top_p": rng.choice((0.9, 1.0))}
    if rng.random() < 0.15:
        body |= {"frequency_penalty": 0.5, "presence_penalty": 0.2, "repetition_penalty": 1.1}
    if rng.random() < 0.15:
        body["stop"] = ["return", "\n\n"]
    if rng.random() < 0.1:
        body["n"] = rng.randrange(2, 4)
    if rng.random() < 0.1:
        body["logprobs"] = 2
    if rng.random() < 0.1:
        body |= {"min_tokens": 1, "ignore_eos": True}
    if rng.random() < 0.1:
        # Long enough to be there when somebody more urgent comes.
        body |= {"prompt": _text(rng, 20), "max_tokens": rng.randrange(200, 320), "ignore_eos": True, "priority": 1}
    elif rng.random() < 0.3:
        body["priority"] = -1
    leaves = body["stream"] and rng.random() < 0.2
    return PlannedSoakRequest(body=body, leaves_after=rng.randrange(0, 12) if leaves else None)


def _text(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choices(_WORDS, k=num_words))


def run_request_soak(
    work_dir: Path, results: Path, command: Sequence[str], *, seed: int, num_requests: int, compare_every: int
) -> None:
    """Drive the server, compare with a clean one, write soak_requests.json."""
    artifact = work_dir / "artifacts" / "demo-code-soak.xllm"
    say("compiling demo-code")
    compile_model(DEMO_MODEL, artifact, ["--dtype", "bfloat16", "--max-model-len", str(_MAX_MODEL_LEN)])
    planned = plan_requests(num_requests, seed)
    with ServerProcess(artifact, _SERVER_OPTIONS) as server:
        server.wait_ready()
        began = time.monotonic()
        answers, footprints = asyncio.run(_drive(server, planned))
        seconds = time.monotonic() - began
        left = asyncio.run(_metrics_at_rest(server))
    checked = [index for index in range(0, num_requests, compare_every) if planned[index].leaves_after is None]
    say(f"{len(checked)} of the requests again, one by one, on a clean server")
    with ServerProcess(artifact, _CLEAN_OPTIONS) as server:
        server.wait_ready()
        expected = asyncio.run(_one_by_one(server, [planned[index] for index in checked]))
    different = [index for index, answer in zip(checked, expected, strict=True) if answers[index] != answer]
    failed = [answer["error"] for answer in answers if answer and "error" in answer]
    rows = [
        (str(each.num_done), f"{each.memory_bytes / _MIB:.1f}", str(each.num_files), str(each.num_mappings))
        for each in footprints[:: max(len(footprints) // 10, 1)]
    ]
    show_table("the server while it serves", ("requests", "memory, MiB", "files", "mappings"), rows)
    raw = {
        "requests": num_requests,
        "left_early": sum(each.leaves_after is not None for each in planned),
        "seconds": seconds,
        "server_options": list(_SERVER_OPTIONS),
        "compared": len(checked),
        "different": different,
        "errors": failed[:10],
        "metrics_at_rest": left,
        "footprints": [[each.num_done, each.memory_bytes, each.num_files, each.num_mappings] for each in footprints],
    }
    num_preemptions, num_swaps = left["xllm_preemptions_total"], left["xllm_swap_preemptions_total"]
    bars = [
        Bar(what="requests that failed", value=len(failed), unit="", bar="<= 0"),
        Bar(what="answers that differ from a clean run's", value=len(different), unit="", bar="<= 0"),
        Bar(what="answers compared", value=len(checked), unit=""),
        Bar(what="KV tokens in use at rest", value=left["xllm_kv_cache_tokens_used"], unit="", bar="<= 0"),
        Bar(what="preemptions, KV copied out and back", value=num_swaps, unit="", bar=">= 1"),
        Bar(what="preemptions, KV computed again", value=num_preemptions - num_swaps, unit="", bar=">= 1"),
        Bar(what="KV swapped out at rest", value=left["xllm_kv_swap_bytes"], unit="B", bar="<= 0"),
        Bar(
            what="memory, growth after the first tenth",
            value=_growth(footprints, "memory_bytes") / _MIB,
            unit="MiB",
            bar="<= 8",
        ),
        Bar(what="open files, growth", value=_growth(footprints, "num_files"), unit="", bar="<= 0"),
        Bar(what="mappings, growth", value=_growth(footprints, "num_mappings"), unit="", bar="<= 64"),
    ]
    finish(make_record("soak_requests", command, seed=seed, raw=raw, bars=bars), results)


def _growth(footprints: Sequence[Footprint], name: str) -> float:
    """From the median of the second tenth to that of the last: the first is warm-up."""
    values = [float(getattr(each, name)) for each in footprints]
    tenth = max(len(values) // 10, 1)
    return statistics.median(values[-tenth:]) - statistics.median(values[tenth : 2 * tenth] or values)


async def _drive(
    server: ServerProcess, planned: Sequence[PlannedSoakRequest]
) -> tuple[list[dict[str, Any] | None], list[Footprint]]:
    """Answers in the order of the requests, None where the client left; footprints between waves of requests.

    Each wave ends before the next begins: what is left then is what the server keeps.
    """
    answers: list[dict[str, Any] | None] = []
    footprints = []
    free = asyncio.Semaphore(_CONCURRENCY)

    async def send(request: PlannedSoakRequest) -> dict[str, Any] | None:
        async with free:
            return await _send(server, request)

    wave = max(len(planned) // _SAMPLES, 1)
    for begin in range(0, len(planned), wave):
        answers += await asyncio.gather(*map(send, planned[begin : begin + wave]))
        await _metrics_at_rest(server)
        footprints.append(_footprint(server, len(answers)))
    return answers, footprints


async def _one_by_one(server: ServerProcess, planned: Sequence[PlannedSoakRequest]) -> list[dict[str, Any] | None]:
    return [await _send(server, request) for request in planned]


async def _send(server: ServerProcess, request: PlannedSoakRequest) -> dict[str, Any] | None:
    """What the client sees: text, token count and reason of each choice, or the error. None when it leaves."""
    reader, writer = await _post(server, request.body)
    try:
        status = (await reader.readline()).decode().split(" ")[1:2]
        lines = 0
        choices: dict[int, dict[str, Any]] = {}
        rest = b""
        while line := await reader.readline():
            if request.leaves_after is not None and lines >= request.leaves_after:
                return None
            lines += line.startswith(b"data: ")
            if not request.body["stream"] or status != ["200"]:
                rest += line
            elif line.startswith(b"data: {"):
                _add(choices, json.loads(line[6:]))
        if status != ["200"]:
            return {"error": f"{status}: {rest.decode(errors='replace')[-300:]}"}
        if not request.body["stream"]:
            _add(choices, json.loads(rest.partition(b"\r\n\r\n")[2] or rest[rest.index(b"{") :]))
        return {str(index): choice for index, choice in sorted(choices.items())}
    except (OSError, asyncio.IncompleteReadError, ValueError, KeyError) as err:
        return {"error": f"{type(err).__name__}: {err}"}
    finally:
        writer.close()


def _add(choices: dict[int, dict[str, Any]], event: Mapping[str, Any]) -> None:
    if "error" in event:
        raise ValueError(str(event["error"]))
    for choice in event["choices"]:
        held = choices.setdefault(choice["index"], {"text": "", "reason": None, "tokens": []})
        held["text"] += choice["text"]
        held["reason"] = choice["finish_reason"] or held["reason"]
        if choice.get("logprobs"):
            held["tokens"] += choice["logprobs"]["tokens"]


async def _post(server: ServerProcess, body: Mapping[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    payload = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(server.host, server.port, limit=1 << 22)
    head = (
        "POST /v1/completions HTTP/1.1\r\n"
        f"Host: {server.host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    )
    writer.write(head.encode() + payload)
    await writer.drain()
    return reader, writer


async def _metrics_at_rest(server: ServerProcess) -> dict[str, float]:
    """The server's metrics once nothing runs: clients that left are noticed a moment later."""
    while True:
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(f"GET /metrics HTTP/1.1\r\nHost: {server.host}\r\nConnection: close\r\n\r\n".encode())
        text = (await reader.read()).decode()
        writer.close()
        lines = (line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("xllm_") and "{" not in line)
        metrics = {name: float(value) for name, value in lines}
        if not (metrics["xllm_open_streams"] or metrics["xllm_num_requests_running"]):
            return metrics
        await asyncio.sleep(0.02)


def _footprint(server: ServerProcess, num_done: int) -> Footprint:
    root = Path(f"/proc/{server.pid}")
    lines = (line.split() for line in (root / "smaps_rollup").read_text().splitlines())
    kib = {words[0].rstrip(":"): int(words[1]) for words in lines if words[-1] == "kB"}
    return Footprint(
        num_done=num_done,
        memory_bytes=(kib["Pss_Anon"] + kib["Pss_Shmem"]) * 1024,
        num_files=len(list((root / "fd").iterdir())),
        num_mappings=len((root / "maps").read_text().splitlines()),
    )
