"""Serving: an OpenAI endpoint under concurrent streams, as its clients see it."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from xllm_compile.benchmarks.console import finish, say, show_table
from xllm_compile.benchmarks.engine_process import TokenIds
from xllm_compile.benchmarks.load import ForeignLoad
from xllm_compile.benchmarks.openai_client import StreamResult, stream_completion
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.server_process import ServerProcess
from xllm_compile.benchmarks.timing import percentile
from xllm_compile.benchmarks.workloads import PlannedRequest, prompt_of
from xllm_compile.scheduler.tls import TlsConfig

_PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeOptions:
    """How a workload is driven. Exactly what the record keeps of it."""

    concurrency: int
    """Most requests open at the same time; those that arrive beyond it wait in the client, and their clock runs."""
    vocab_size: int
    """Prompts are random ids below it."""
    seed: int
    slo_ttft_s: float
    slo_tpot_s: float
    model: str | None = None


def run_serve(
    target: str,
    requests: Sequence[PlannedRequest],
    options: ServeOptions,
    results: Path,
    command: Sequence[str],
    *,
    name: str,
    api_key: str | None = None,
    tls: TlsConfig | None = None,
) -> None:
    """Drive ``target`` (a URL, or an artifact, which is served for the run) and write NAME.json."""
    context = (tls or TlsConfig()).client_context() if target.startswith("https://") else None
    send = partial(stream_completion, model=options.model, api_key=api_key, tls=context)
    with ExitStack() as stack:
        if target.startswith(("http://", "https://")):
            host, port = _endpoint(target)
        else:
            say(f"serving {target}")
            server = stack.enter_context(ServerProcess(Path(target)))
            server.wait_ready()
            host, port = server.host, server.port
        warm_up = asyncio.run(send(host, port, [1, 2, 3], 2))
        if warm_up.error is not None:
            raise RuntimeError(f"{target} does not answer a first request: {warm_up.error}")
        say(f"sending {len(requests)} requests, at most {options.concurrency} at a time")
        with ForeignLoad() as load:
            began = time.monotonic()
            done = asyncio.run(drive(partial(send, host, port), requests, options))
            wall_s = time.monotonic() - began
    found = summarise_run(done, wall_s, options)
    rows = [
        (metric.removesuffix("_s"), *(f"{values[f'p{percent}'] * 1000:.1f}" for percent in _PERCENTILES))
        for metric, values in found["latency_s"].items()
    ]
    show_table(f"{name}: {len(requests)} requests, ms", ("", *(f"p{percent}" for percent in _PERCENTILES)), rows)
    raw = {
        "options": asdict(options),
        "workload": [asdict(request) for request in requests],
        # A server of our own making is inside "own" work; one behind a URL counts as foreign.
        "foreign_cores": load.cores,
        **found,
    }
    bars = [
        Bar(what="output tokens", value=found["output_tokens_per_s"], unit="tok/s"),
        Bar(what="goodput", value=found["goodput_rps"], unit="requests/s"),
        Bar(what="failed requests", value=found["num_failed"], unit="", bar="<= 0"),
    ]
    finish(make_record(name, command, seed=options.seed, raw=raw, bars=bars), results)


async def drive(
    send: Callable[[TokenIds, int], Awaitable[StreamResult]], requests: Sequence[PlannedRequest], options: ServeOptions
) -> list[StreamResult]:
    """Send each request at its time; results in the order of the requests."""
    free = asyncio.Semaphore(options.concurrency)
    prompts = [
        prompt_of(request, index, vocab_size=options.vocab_size, seed=options.seed)
        for index, request in enumerate(requests)
    ]
    began = time.monotonic()

    async def send_at_its_time(request: PlannedRequest, prompt: list[int]) -> StreamResult:
        await asyncio.sleep(began + request.arrival_s - time.monotonic())
        async with free:
            result = await send(prompt, request.output_tokens)
        if request.arrival_s > 0:
            # Open loop: a request that had to wait for a free stream waited for the server.
            result.sent = began + request.arrival_s
        return result

    return await asyncio.gather(*map(send_at_its_time, requests, prompts))


def summarise_run(done: Sequence[StreamResult], wall_s: float, options: ServeOptions) -> dict[str, Any]:
    """Throughput, goodput and percentiles of ttft, tpot, itl and e2e over the requests that succeeded.

    Goodput counts the requests that met both limits, per second. Raises RuntimeError when none succeeded.
    """
    whole = [result for result in done if result.error is None]
    failed = [result for result in done if result.error is not None]
    if not whole:
        raise RuntimeError(f"all {len(done)} requests failed; the first with: {failed[0].error}")
    good = [
        result
        for result in whole
        if result.ttft_s <= options.slo_ttft_s and (result.tpot_s is None or result.tpot_s <= options.slo_tpot_s)
    ]
    metrics = {
        "ttft_s": [result.ttft_s for result in whole],
        "tpot_s": [result.tpot_s for result in whole if result.tpot_s is not None],
        "itl_s": [gap for result in whole for gap in result.itl_s],
        "e2e_s": [result.e2e_s for result in whole],
    }
    return {
        "wall_s": wall_s,
        "num_requests": len(done),
        "num_good": len(good),
        "num_failed": len(failed),
        "errors": sorted({str(result.error) for result in failed})[:5],
        "output_tokens_per_s": sum(result.num_output_tokens for result in whole) / wall_s,
        "goodput_rps": len(good) / wall_s,
        "latency_s": {
            metric: {f"p{percent}": percentile(values, percent) for percent in _PERCENTILES}
            for metric, values in metrics.items()
            if values
        },
    }


def _endpoint(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    if parts.hostname is None or parts.path not in ("", "/", "/v1", "/v1/"):
        raise ValueError(f"{url!r} must be http://HOST:PORT or https://HOST:PORT; other paths are not measured")
    return parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
