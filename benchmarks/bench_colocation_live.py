"""Offline requests beside online ones on real instances: how many online ones are late, and how fast offline ones."""

import asyncio
import json
import random
import time
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xllm_compile.benchmarks.artifacts import artifact_of_demo
from xllm_compile.benchmarks.cluster_processes import ClusterProcesses
from xllm_compile.benchmarks.console import finish, say, show_table
from xllm_compile.benchmarks.load import ForeignLoad
from xllm_compile.benchmarks.openai_client import StreamResult, stream_completion
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.server_process import ServerProcess
from xllm_compile.benchmarks.timing import percentile
from xllm_compile.scheduler.tasks import cancel_all

_ROLES = ("prefill", "prefill", "decode", "decode")
_OPTIONS = ("--threads", "1", "--kv-memory", "256MiB", "--scheduling-policy", "priority", "--no-graph-promotion")
ALONE, BASE, PRIORITY, COLOCATION = "online alone", "base P/D", "online priority", "co-location"
# What offline requests say in each: nothing, to come behind the others everywhere, or that they are offline.
_FIELDS: dict[str, dict[str, Any]] = {BASE: {}, PRIORITY: {"priority": 10}, COLOCATION: {"offline": True}}
_ONLINE_PROMPT, _ONLINE_TOKENS = (64, 256), (16, 64)
_OFFLINE_PROMPT, _OFFLINE_TOKENS = (64, 384), (64, 192)
# Targets are so many times what online requests have alone, at their 90th percentile. Four instances, a gateway and the
# client share this host's cores: what one computes offline slows down all, which no policy of an instance sees.
_SLACK = 5.0
# Until the first offline requests decode.
_WARM_UP_S = 3.0


@dataclass(kw_only=True, slots=True)
class _Outcome:
    online: list[StreamResult] = field(default_factory=list)
    num_offline_tokens: int = 0
    seconds: float = 0.0
    num_failed: int = 0
    counts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Targets:
    ttft_s: float
    tpot_s: float

    def violations(self, results: Sequence[StreamResult]) -> float:
        """Share that missed one, or failed."""
        missed = sum(
            one.error is not None or one.ttft_s > self.ttft_s or (one.tpot_s or 0.0) > self.tpot_s for one in results
        )
        return missed / max(1, len(results))


def run_colocation_live(
    work_dir: Path,
    results: Path,
    command: Sequence[str],
    *,
    seed: int,
    seconds: float,
    online_rate: float,
    in_flight: int,
) -> None:
    """So many offline requests are always open, online ones come at random. Writes colocation_live.json."""
    artifact = artifact_of_demo(work_dir)
    outcomes: dict[str, _Outcome] = {}
    targets: _Targets | None = None
    with ForeignLoad() as foreign:
        for mode in (ALONE, BASE, PRIORITY, COLOCATION):
            say(f"{mode}: {seconds:g} s")
            options = []
            if mode == COLOCATION:
                assert targets is not None
                options = ["--colocation", "--tpot-slo-ms", str(targets.tpot_s * 1e3)]
                options += ["--ttft-slo-ms", str(targets.ttft_s * 1e3)]
            with ExitStack() as stack:
                gateway = _start(stack, artifact, options)
                driving = _drive(
                    gateway, _FIELDS.get(mode), seed=seed, seconds=seconds, rate=online_rate, in_flight=in_flight
                )
                found = outcomes[mode] = asyncio.run(driving)
            if mode == ALONE:
                targets = _targets(found.online)
    assert targets is not None
    _finish(outcomes, targets, results, command, seed, foreign.cores, seconds, online_rate, in_flight)


def _finish(
    outcomes: dict[str, _Outcome],
    targets: _Targets,
    results: Path,
    command: Sequence[str],
    seed: int,
    foreign_cores: float,
    seconds: float,
    online_rate: float,
    in_flight: int,
) -> None:
    missed = {mode: 100 * targets.violations(one.online) for mode, one in outcomes.items()}
    speed = {mode: one.num_offline_tokens / one.seconds for mode, one in outcomes.items()}
    show_table(
        f"TTFT within {targets.ttft_s * 1e3:.0f} ms, TPOT within {targets.tpot_s * 1e3:.1f} ms",
        ("mode", "online requests", "missed", "offline tokens/s"),
        [(mode, str(len(one.online)), f"{missed[mode]:.1f} %", f"{speed[mode]:.0f}") for mode, one in outcomes.items()],
    )
    bars = [Bar(what=f"online requests that missed a target, {mode}", value=missed[mode], unit="%") for mode in _FIELDS]
    bars[-1] = Bar(what=bars[-1].what, value=missed[COLOCATION], unit="%", bar="<= 3")
    bars += [Bar(what=f"offline tokens/s, {mode}", value=speed[mode], unit="tokens/s") for mode in _FIELDS]
    num_failed = sum(one.num_failed for one in outcomes.values())
    bars.append(Bar(what="requests that failed", value=num_failed, unit="", bar="<= 0"))
    raw = {
        "roles": list(_ROLES),
        "options": list(_OPTIONS),
        "seconds": seconds,
        "online_rate": online_rate,
        "offline_in_flight": in_flight,
        "targets": {"ttft_s": targets.ttft_s, "tpot_s": targets.tpot_s},
        "modes": {
            mode: {
                "online_ttft_s": [each.ttft_s for each in one.online if each.error is None],
                "online_tpot_s": [each.tpot_s for each in one.online if each.error is None],
                "offline_tokens": one.num_offline_tokens,
                "seconds": one.seconds,
                "counts": one.counts,
            }
            for mode, one in outcomes.items()
        },
        "foreign_cores": foreign_cores,
    }
    finish(make_record("colocation_live", command, seed=seed, raw=raw, bars=bars), results)


def _targets(online: Sequence[StreamResult]) -> _Targets:
    served = [one for one in online if one.error is None]
    if not served:
        raise RuntimeError(f"no online request was served; the first one says: {online[0].error if online else 'none'}")
    return _Targets(
        ttft_s=_SLACK * percentile([one.ttft_s for one in served], 90),
        tpot_s=_SLACK * percentile([one.tpot_s or 0.0 for one in served], 90),
    )


def _start(stack: ExitStack, artifact: Path, options: Sequence[str]) -> ServerProcess:
    """The gateway of a service of its own."""
    gateway = stack.enter_context(ServerProcess(artifact, ["--role", "gateway", "--registry-port", "0", *options]))
    gateway.wait_ready()
    cluster = stack.enter_context(ClusterProcesses(artifact, gateway.registry))
    for index, role in enumerate(_ROLES):
        cluster.add(f"{role}-{index}", role, _OPTIONS)
    return gateway


async def _drive(
    gateway: ServerProcess, offline: dict[str, Any] | None, *, seed: int, seconds: float, rate: float, in_flight: int
) -> _Outcome:
    """offline: fields of offline requests; None sends none."""
    outcome = _Outcome()
    rng = random.Random(f"{seed} offline")

    async def repeat() -> None:
        while True:
            prompt, num_tokens = _request(rng, _OFFLINE_PROMPT, _OFFLINE_TOKENS)
            found = await stream_completion(gateway.host, gateway.port, prompt, num_tokens, fields=offline)
            outcome.num_failed += found.error is not None
            outcome.num_offline_tokens += sum(began <= at <= began + seconds for at in found.token_times)
            if found.error is not None:
                await asyncio.sleep(found.retry_after_s or 1.0)

    began = time.monotonic() + _WARM_UP_S
    repeating = [asyncio.create_task(repeat()) for _ in range(in_flight if offline is not None else 0)]
    arrivals = random.Random(f"{seed} online")
    online = []
    at = began
    while (at := at + arrivals.expovariate(rate)) < began + seconds:
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        prompt, num_tokens = _request(arrivals, _ONLINE_PROMPT, _ONLINE_TOKENS)
        online.append(asyncio.create_task(stream_completion(gateway.host, gateway.port, prompt, num_tokens)))
    outcome.online = list(await asyncio.gather(*online))
    # What is open still has tokens of the time that counts.
    await asyncio.sleep(max(0.0, began + seconds - time.monotonic()))
    outcome.num_failed += sum(one.error is not None for one in outcome.online)
    await cancel_all(repeating)
    outcome.seconds = seconds
    outcome.counts = await asyncio.to_thread(_counts, gateway)
    return outcome


def _counts(gateway: ServerProcess) -> dict[str, float]:
    """What the gateway counted of its requests' ways."""
    with urllib.request.urlopen(f"http://{gateway.host}:{gateway.port}/cluster", timeout=10) as answer:
        counts: dict[str, float] = json.load(answer)["counts"]
    return counts


def _request(rng: random.Random, prompt: tuple[int, int], output: tuple[int, int]) -> tuple[list[int], int]:
    """Token ids, and how many to generate; no two prompts begin alike."""
    return [rng.randrange(100, 1000) for _ in range(rng.randint(*prompt))], rng.randint(*output)
