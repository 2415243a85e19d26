"""A service whose processes are killed, stopped and started again while hundreds of requests are under way: every
answer must come, and be the one that an undisturbed server gives."""

import asyncio
import random
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xllm_compile.benchmarks.artifacts import compile_model
from xllm_compile.benchmarks.cluster_processes import ClusterProcesses, Part
from xllm_compile.benchmarks.console import finish, say, show_table
from xllm_compile.benchmarks.etcd_process import EtcdProcess
from xllm_compile.benchmarks.openai_client import StreamResult, stream_completion
from xllm_compile.benchmarks.parity import DEMO_MODEL
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.server_process import ServerProcess
from xllm_compile.benchmarks.timing import percentile
from xllm_compile.scheduler.tasks import cancel_all

_ROLES = {"M": "mix", "P": "prefill", "D": "decode"}
_NUM_PROMPTS = 48
_PROMPT_TOKENS = (8, 160)
_OUTPUT_TOKENS = (16, 160)
_MAX_MODEL_LEN = 512
_OPTIONS = ("--threads", "1", "--max-num-seqs", "64", "--kv-memory", "96MiB", "--no-graph-promotion")
_PAUSE_S = (2.0, 6.0)
"""Between two disturbances."""
_STOPPED_S = 5.0
_ETCD_AWAY_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    token_ids: list[int]
    num_tokens: int
    text: str
    """The right answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    prompt: Prompt
    gateway: str
    result: StreamResult


@dataclass(kw_only=True, slots=True)
class Disturbance:
    kind: str
    part: str
    at_s: float


@dataclass(slots=True)
class Tally:
    answers: list[Answer] = field(default_factory=list)
    disturbances: list[Disturbance] = field(default_factory=list)


def run_chaos(
    work_dir: Path, results: Path, command: Sequence[str], *, seed: int, minutes: float, in_flight: int, instances: str
) -> None:
    """instances: roles by their first letter, such as MMMM or PPDD. Writes chaos.json. Raises ValueError on others."""
    if not instances or any(letter not in _ROLES for letter in instances):
        raise ValueError(f"--instances {instances} must be letters of {', '.join(_ROLES)}, such as MMMM or PPDD")
    artifact = work_dir / "artifacts" / "demo-code-chaos.xllm"
    say("compiling demo-code")
    # In float32 tokens are the same however a step is put together.
    compile_model(DEMO_MODEL, artifact, ["--dtype", "float32", "--max-model-len", str(_MAX_MODEL_LEN)])
    rng = random.Random(seed)
    say("what an undisturbed server answers")
    with ServerProcess(artifact, ["--no-graph-promotion"]) as server:
        server.wait_ready()
        prompts = asyncio.run(_right_answers(server, rng))
    with (
        tempfile.TemporaryDirectory() as folder,
        EtcdProcess(Path(folder)) as etcd,
        ClusterProcesses(artifact, f"etcd://{etcd.endpoint}") as cluster,
    ):
        for index, letter in enumerate(instances):
            role = _ROLES[letter]
            cluster.add(f"{role}-{index}", role, _OPTIONS)
        for index in range(2):
            cluster.add(f"gateway-{index}", "gateway", ["--max-streams", "4096", "--routing", "load"])
        say(f"{minutes:g} minutes of disturbances")
        tally = asyncio.run(_run(cluster, etcd, prompts, rng, minutes * 60, in_flight))
        at_rest = asyncio.run(_at_rest(cluster))
    _report(results, command, seed, tally, at_rest, minutes, in_flight, instances)


async def _right_answers(server: ServerProcess, rng: random.Random) -> list[Prompt]:
    prompts = []
    for _ in range(_NUM_PROMPTS):
        token_ids = [rng.randrange(100, 1000) for _ in range(rng.randint(*_PROMPT_TOKENS))]
        num_tokens = rng.randint(*_OUTPUT_TOKENS)
        result = await stream_completion(server.host, server.port, token_ids, num_tokens)
        if result.error is not None:
            raise RuntimeError(f"the undisturbed server failed: {result.error}")
        prompts.append(Prompt(token_ids=token_ids, num_tokens=num_tokens, text=result.text))
    return prompts


async def _run(
    cluster: ClusterProcesses,
    etcd: EtcdProcess,
    prompts: Sequence[Prompt],
    rng: random.Random,
    seconds: float,
    in_flight: int,
) -> Tally:
    tally = Tally()
    end_s = time.monotonic() + seconds
    clients = [asyncio.create_task(_client(cluster, prompts, rng, end_s, tally)) for _ in range(in_flight)]
    trouble = asyncio.create_task(_disturb(cluster, etcd, rng, end_s, tally))
    try:
        await trouble
        await asyncio.gather(*clients)
    finally:
        await cancel_all([trouble, *clients])
    return tally


async def _client(
    cluster: ClusterProcesses, prompts: Sequence[Prompt], rng: random.Random, end_s: float, tally: Tally
) -> None:
    """One request after the other, each until it has its answer."""
    while time.monotonic() < end_s:
        prompt = rng.choice(prompts)
        gateway = rng.choice([part for name, part in cluster.parts.items() if name.startswith("gateway")])
        server = gateway.process
        result = await stream_completion(server.host, server.port, prompt.token_ids, prompt.num_tokens)
        tally.answers.append(Answer(prompt=prompt, gateway=gateway.name, result=result))
        if result.error is not None:
            await asyncio.sleep(0.2)


async def _disturb(
    cluster: ClusterProcesses, etcd: EtcdProcess, rng: random.Random, end_s: float, tally: Tally
) -> None:
    """One thing after the other, each over before the next begins: somebody always can serve."""
    kinds: Mapping[str, Callable[[Part], Awaitable[None]]] = {
        "instance killed": lambda part: _kill(cluster, part),
        "instance stopped": _stop,
        "gateway killed": lambda part: _kill(cluster, part),
        "etcd killed": lambda part: _kill_etcd(etcd),
    }
    while time.monotonic() + 15 < end_s:
        await asyncio.sleep(rng.uniform(*_PAUSE_S))
        kind = rng.choices(list(kinds), weights=(4, 3, 1, 1))[0]
        parts = [
            part for name, part in cluster.parts.items() if name.startswith("gateway") == (kind == "gateway killed")
        ]
        part = rng.choice(parts)
        name = "etcd" if kind == "etcd killed" else part.name
        tally.disturbances.append(Disturbance(kind=kind, part=name, at_s=time.monotonic()))
        await kinds[kind](part)


async def _kill(cluster: ClusterProcesses, part: Part) -> None:
    part.send(signal.SIGKILL)
    await asyncio.to_thread(cluster.restart, part)


async def _stop(part: Part) -> None:
    part.send(signal.SIGSTOP)
    await asyncio.sleep(_STOPPED_S)
    part.send(signal.SIGCONT)


async def _kill_etcd(etcd: EtcdProcess) -> None:
    etcd.kill()
    await asyncio.sleep(_ETCD_AWAY_S)
    await asyncio.to_thread(etcd.start)


async def _at_rest(cluster: ClusterProcesses) -> dict[str, dict[str, float]]:
    """Metrics of every instance once nothing runs: what is held then is held for nobody."""
    # Reservations that nobody came for end by themselves within a minute.
    deadline = time.monotonic() + 90
    while True:
        found = {}
        for name, part in cluster.parts.items():
            if not name.startswith("gateway"):
                found[name] = await _metrics(part.process)
        held = [value for metrics in found.values() for value in metrics.values()]
        if not any(held) or time.monotonic() > deadline:
            return found
        await asyncio.sleep(1)


async def _metrics(server: ServerProcess) -> dict[str, float]:
    reader, writer = await asyncio.open_connection(server.host, server.port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    names = ("xllm_kv_cache_tokens_used", "xllm_open_streams", "xllm_num_requests_running", "xllm_kv_reservations_open")
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith(names))
    return {name: float(value) for name, value in values.items()}


def recoveries_s(tally: Tally, kind: str) -> list[float]:
    """Of each stream that an instance may have served when it was killed, or stopped: from there to its next token.

    A stream whose instance was another one goes on at once; only gaps far above those are counted.
    """
    found = []
    for disturbance in tally.disturbances:
        if disturbance.kind != kind:
            continue
        for answer in tally.answers:
            times = answer.result.token_times
            if times and times[0] < disturbance.at_s < times[-1]:
                after = next(time_s for time_s in times if time_s > disturbance.at_s)
                before = max(time_s for time_s in times if time_s <= disturbance.at_s)
                usual = sorted(answer.result.itl_s)[len(times) // 2] if len(times) > 2 else 0.0
                if after - before > 5 * usual:
                    found.append(after - disturbance.at_s)
    return found


def _report(
    results: Path,
    command: Sequence[str],
    seed: int,
    tally: Tally,
    at_rest: Mapping[str, Mapping[str, float]],
    minutes: float,
    in_flight: int,
    instances: str,
) -> None:
    killed_gateways = {each.part: each.at_s for each in tally.disturbances if each.kind == "gateway killed"}
    failed = [each for each in tally.answers if each.result.error is not None]
    # The connection of a client ends with its gateway's process, whatever others do.
    cut = [each for each in failed if _is_cut(each, tally)]
    refused = [each for each in failed if each not in cut and "HTTP/1.1 429" in (each.result.error or "")]
    lost = [each for each in failed if each not in cut and each not in refused]
    good = [each for each in tally.answers if each.result.error is None]
    wrong = [each for each in good if each.result.text != each.prompt.text]
    gaps = {kind: sorted(recoveries_s(tally, kind)) for kind in ("instance killed", "instance stopped")}
    held = sum(value for metrics in at_rest.values() for value in metrics.values())
    kinds: dict[str, int] = {}
    for each in tally.disturbances:
        kinds[each.kind] = kinds.get(each.kind, 0) + 1
    show_table("disturbances", ("what", "times"), [(kind, str(count)) for kind, count in sorted(kinds.items())])
    bars = [
        Bar(what="requests answered", value=len(good), unit=""),
        Bar(what="requests that failed", value=len(lost), unit="", bar="<= 0"),
        Bar(what="requests refused with Retry-After", value=len(refused), unit=""),
        Bar(what="connections cut with their gateway", value=len(cut), unit=""),
        Bar(what="answers with a wrong token", value=len(wrong), unit="", bar="<= 0"),
        Bar(what="tokens, streams and reservations held at rest", value=held, unit="", bar="<= 0"),
    ]
    for kind, seconds in gaps.items():
        if seconds:
            bars.append(Bar(what=f"{kind}: pause of its streams, median", value=percentile(seconds, 50), unit="s"))
            bars.append(Bar(what=f"{kind}: pause of its streams, p99", value=percentile(seconds, 99), unit="s"))
    raw: dict[str, Any] = {
        "minutes": minutes,
        "in_flight": in_flight,
        "instances": instances,
        "instance_options": list(_OPTIONS),
        "disturbances": [[each.kind, each.part] for each in tally.disturbances],
        "gateways_killed": len(killed_gateways),
        "errors": [each.result.error for each in lost[:10]],
        "recoveries_s": gaps,
        "at_rest": {name: dict(metrics) for name, metrics in at_rest.items()},
    }
    finish(make_record("chaos", command, seed=seed, raw=raw, bars=bars), results)


def _is_cut(answer: Answer, tally: Tally) -> bool:
    return any(
        each.kind == "gateway killed"
        and each.part == answer.gateway
        and answer.result.sent <= each.at_s + 10
        and each.at_s <= answer.result.ended
        for each in tally.disturbances
    )
