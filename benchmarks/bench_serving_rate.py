"""The rate of requests at which servers still send tokens in time: ours and others', each with the machine to itself.

Requests arrive as a Poisson process with mixed lengths, and are served well where their tokens come in time on average
and the first is not kept for long. Every server is asked over HTTP, by the same client, for the same requests.
"""

import asyncio
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Self
from urllib.error import URLError
from urllib.request import urlopen

from xllm_compile.benchmarks.bench_serve import ServeOptions, drive, summarise_run
from xllm_compile.benchmarks.child_process import ChildProcess, free_port
from xllm_compile.benchmarks.console import finish, say, show_table
from xllm_compile.benchmarks.load import ForeignLoad, wait_quiet
from xllm_compile.benchmarks.openai_client import stream_completion
from xllm_compile.benchmarks.rate_search import bracket, crossing
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.simulation.chart import attainment_chart, page
from xllm_compile.benchmarks.workloads import PlannedRequest, mixed_requests

OURS = "xllm-compile"
ENOUGH = 0.95
_START_TIMEOUT_S = 300.0
_WARM_UP_REQUESTS = 12
_FIRST_SHARE = 0.7
"""Of the rate that a burst of requests is answered at, tried first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """A server that is started for the run, and what it calls its model."""

    name: str
    command: tuple[str, ...]
    """``{port}`` stands for the one to listen on, on the loopback."""
    model: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """From NAME=COMMAND or NAME@MODEL=COMMAND. Raises ValueError saying what is missing."""
        head, found, command = text.partition("=")
        name, _, model = head.partition("@")
        if not found or not name or "{port}" not in command:
            raise ValueError(f"{text!r} must be NAME=COMMAND or NAME@MODEL=COMMAND, with {{port}} in the command")
        return cls(name=name, command=tuple(shlex.split(command)), model=model or None)

    @classmethod
    def ours(cls, artifact: Path, tpot_slo_s: float) -> Self:
        command = [sys.executable, "-m", "xllm_compile.scheduler.serve", str(artifact), "--port", "{port}"]
        targets = ["--grpc-port", "0", "--tpot-slo-ms", f"{tpot_slo_s * 1000:g}"]
        return cls(name=OURS, command=(*command, *targets))

    def to_json(self) -> dict[str, Any]:
        """Without the folder of the program: where it lies on this machine is nobody's business."""
        program, *arguments = self.command
        return {"name": self.name, "command": [Path(program).name, *arguments], "model": self.model}


@dataclass(frozen=True, kw_only=True, slots=True)
class RateSetting:
    rounds: int
    max_tries: int
    """Rates, of each server and round."""
    seconds: float
    """Of arrivals at each rate."""
    slo_ttft_s: float
    slo_tpot_s: float
    vocab_size: int
    """Prompts are random ids below it."""
    seed: int


@dataclass(slots=True)
class Found:
    """Of one server."""

    burst_rps: list[float] = field(default_factory=list)
    """Requests answered a second where all come at once, by round."""
    points: list[dict[float, float]] = field(default_factory=list)
    """Share of requests that were served well by rate, by round."""
    trials: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Sustained, by round."""
        return [crossing(points, ENOUGH) for points in self.points]

    @property
    def is_bracketed(self) -> bool:
        """Whether every round tried a rate that was served well and one that was too much; else its limit is a
        guess."""
        return all(min(points.values()) < ENOUGH <= max(points.values()) for points in self.points)


def run_serving_rate(
    contenders: Sequence[Contender],
    setting: RateSetting,
    results: Path,
    command: Sequence[str],
    *,
    name: str,
) -> None:
    """Measure and write NAME.json and NAME.html. The first contender is compared with the best of the others."""
    found = {contender.name: Found() for contender in contenders}
    for index in range(setting.rounds):
        for contender in contenders if index % 2 == 0 else reversed(contenders):
            say(f"round {index + 1} of {setting.rounds}: starting {contender.name}")
            wait_quiet()
            with _Server(contender) as server:
                _search(server, setting, found[contender.name], first_seed=setting.seed + 1000 * index)
    rows = [
        (server, f"{median(one.rates):.2f}", f"{min(one.rates):.2f}", f"{max(one.rates):.2f}")
        for server, one in found.items()
    ]
    asked = f"TPOT <= {setting.slo_tpot_s * 1000:g} ms and TTFT <= {setting.slo_ttft_s:g} s for {ENOUGH:.0%}"
    show_table(f"requests/s with {asked}", ("server", "median", "min", "max"), rows)
    raw = {
        "setting": asdict(setting),
        "contenders": [contender.to_json() for contender in contenders],
        "found": {server: asdict(one) | {"rates": one.rates} for server, one in found.items()},
    }
    finish(make_record(name, command, seed=setting.seed, raw=raw, bars=_bars(found)), results)
    curves = {
        server: sorted((rate, share) for points in one.points for rate, share in points.items())
        for server, one in found.items()
    }
    (results / f"{name}.html").write_text(page([attainment_chart(f"requests with {asked}", curves, ENOUGH)]))


def _search(server: "_Server", setting: RateSetting, found: Found, *, first_seed: int) -> None:
    """Everything of one round. Each trial has prompts of its own, so that none is found in a cache."""
    seeds = iter(range(first_seed, first_seed + 1000))
    _play(server, mixed_requests(_WARM_UP_REQUESTS, rate=None, seed=setting.seed), setting, next(seeds))
    burst = _play(server, mixed_requests(2 * _WARM_UP_REQUESTS, rate=None, seed=setting.seed), setting, next(seeds))
    found.burst_rps.append(burst["num_requests"] / burst["wall_s"])
    points: dict[float, float] = {}

    def share_served_well(rate: float) -> float:
        count = max(_WARM_UP_REQUESTS, round(rate * setting.seconds))
        # The same lengths and gaps at every rate, for every server: only their pace changes.
        trial = _play(server, mixed_requests(count, rate=rate, seed=setting.seed), setting, next(seeds))
        points[rate] = trial["num_good"] / trial["num_requests"]
        found.trials.append({"rate": rate, **trial})
        say(f"{server.name}: {points[rate]:.0%} of {count} requests in time at {rate:.2f} requests/s")
        return points[rate]

    bracket(share_served_well, ENOUGH, start=_FIRST_SHARE * found.burst_rps[-1], max_tries=setting.max_tries)
    found.points.append(points)
    if not found.is_bracketed:
        extreme = "no rate was too much" if min(points.values()) >= ENOUGH else "every rate was too much"
        say(f"{server.name}: {extreme} in {setting.max_tries} tries; raise --tries to have it compared")


def _play(server: "_Server", requests: Sequence[PlannedRequest], setting: RateSetting, seed: int) -> dict[str, Any]:
    options = ServeOptions(
        # All that have arrived are open: how many it works on is the server's business.
        concurrency=len(requests),
        vocab_size=setting.vocab_size,
        seed=seed,
        slo_ttft_s=setting.slo_ttft_s,
        slo_tpot_s=setting.slo_tpot_s,
        model=server.model,
    )
    send = partial(stream_completion, server.host, server.port, model=server.model)
    with ForeignLoad() as load:
        began = time.monotonic()
        done = asyncio.run(drive(send, requests, options))
        wall_s = time.monotonic() - began
    for request, result in zip(requests, done, strict=True):
        if result.error is None and result.num_output_tokens != request.output_tokens:
            raise RuntimeError(
                f"{server.name} sent {result.num_output_tokens} tokens where {request.output_tokens} were asked for,"
                " with ignore_eos; servers that do other work cannot be compared"
            )
    return {"seed": seed, "foreign_cores": load.cores, **summarise_run(done, wall_s, options)}


def _bars(found: Mapping[str, Found]) -> list[Bar]:
    bars = [Bar(what=f"{name}, sustained", value=median(one.rates), unit="requests/s") for name, one in found.items()]
    ours, *others = found.values()
    if others and all(one.is_bracketed for one in found.values()):
        best = max(median(other.rates) for other in others)
        bars.append(Bar(what="against the best other", value=median(ours.rates) / best, unit="x", bar=">= 1.3"))
    return bars


class _Server(ChildProcess):
    """A contender's process, which is healthy once it is entered."""

    def __init__(self, contender: Contender) -> None:
        self.name, self.model = contender.name, contender.model
        self.host, self.port = "127.0.0.1", free_port()
        command = [part.replace("{port}", str(self.port)) for part in contender.command]
        try:
            super().__init__(command, patience_s=30.0)
        except OSError as err:
            raise RuntimeError(f"{self.name} cannot be started: {err}; the command was {command}") from err

    def __enter__(self) -> Self:
        try:
            self._wait_healthy()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _wait_healthy(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.name} ended with code {self.process.returncode}:\n{self.last_words()}")
            try:
                with urlopen(f"http://{self.host}:{self.port}/health", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except (URLError, OSError):
                pass
            time.sleep(0.2)
        raise RuntimeError(f"{self.name} was not healthy within {_START_TIMEOUT_S:.0f} s:\n{self.last_words()}")
