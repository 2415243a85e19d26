"""The registry: what a put, a get and the news of a put take in memory and in etcd, and kill -9 of etcd."""

import asyncio
import multiprocessing
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from xllm_compile.benchmarks.console import finish, say, show_table
from xllm_compile.benchmarks.etcd_process import EtcdProcess
from xllm_compile.benchmarks.load import ForeignLoad, wait_quiet
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.timing import Summary, summarise
from xllm_compile.scheduler.registry.etcd_config import EtcdConfig
from xllm_compile.scheduler.registry.etcd_registry import EtcdRegistry
from xllm_compile.scheduler.registry.registry import Registry
from xllm_compile.scheduler.registry.registry_server import RegistryServer, served_registry

_VALUE = b"x" * 512
"""About what an instance registers."""
_WARM_UP = 50

Seconds = dict[str, Summary]
"""By operation."""


def run_registry(results: Path, command: Sequence[str], *, operations: int, kills: int) -> None:
    """Measure and write registry.json."""
    wait_quiet()
    with ForeignLoad() as load:
        seconds = asyncio.run(_latencies(operations))
        say(f"etcd: killed and started {kills} times")
        back = asyncio.run(_recoveries(kills))
    rows = [
        (f"{where}: {name}", f"{summary.median * 1e3:.3f}", f"{summary.p99 * 1e3:.3f}")
        for where, each in seconds.items()
        for name, summary in each.items()
    ]
    show_table("registry", ("", "median, ms", "p99, ms"), rows)
    bars = [
        Bar(what=f"{where}: {name}", value=summary.median * 1e3, unit="ms")
        for where, each in seconds.items()
        for name, summary in each.items()
    ]
    bars.append(Bar(what="etcd killed: view right after its return, longest", value=back.max, unit="s", bar="<= 2"))
    raw = {
        "value_bytes": len(_VALUE),
        "seconds": {
            where: {name: summary.to_json() for name, summary in each.items()} for where, each in seconds.items()
        },
        "recovery_s": back.to_json(),
        "foreign_cores": load.cores,
    }
    finish(make_record("registry", command, seed=0, raw=raw, bars=bars), results)


async def _latencies(operations: int) -> dict[str, Seconds]:
    seconds = {}
    async with _memory_process() as client:
        say("memory of another process")
        seconds["memory"] = await _time_operations(client, operations)
    with tempfile.TemporaryDirectory() as folder, EtcdProcess(Path(folder)) as etcd:
        async with EtcdRegistry(EtcdConfig(endpoints=(etcd.endpoint,))) as client:
            say("etcd")
            seconds["etcd"] = await _time_operations(client, operations)
    return seconds


async def _time_operations(registry: Registry, operations: int) -> Seconds:
    seconds: dict[str, list[float]] = {"put": [], "get": [], "put to its news in a watch": []}
    changes = registry.watch("/bench/", (await registry.snapshot("/bench/")).revision)
    for _ in range(_WARM_UP + operations):
        began = time.perf_counter()
        await registry.put("/bench/k", _VALUE)
        put = time.perf_counter()
        await anext(changes)
        seen = time.perf_counter()
        await registry.get("/bench/k")
        got = time.perf_counter()
        for name, value in zip(seconds, (put - began, got - seen, seen - began), strict=True):
            seconds[name].append(value)
    return {name: summarise(values[_WARM_UP:]) for name, values in seconds.items()}


async def _recoveries(kills: int) -> Summary:
    """Seconds from etcd's port answering to a watch from before the kill showing a put from after it."""
    values = []
    with tempfile.TemporaryDirectory() as folder, EtcdProcess(Path(folder)) as etcd:
        async with EtcdRegistry(EtcdConfig(endpoints=(etcd.endpoint,), timeout_s=30)) as registry:
            await registry.put("/bench/k", _VALUE)
            changes = registry.watch("/bench/", (await registry.snapshot("/bench/")).revision)
            for _ in range(kills):
                await registry.put("/bench/k", _VALUE)
                await anext(changes)
                news = asyncio.ensure_future(anext(changes))
                etcd.kill()
                await asyncio.to_thread(etcd.start)
                began = time.perf_counter()
                # Everything that was there is, and what is new arrives.
                before = (await registry.snapshot("/bench/")).entries
                if [entry.value for entry in before] != [_VALUE]:
                    raise RuntimeError(f"etcd came back without its data: {before}")
                await registry.put("/bench/k", _VALUE)
                await news
                values.append(time.perf_counter() - began)
    return summarise(values)


@asynccontextmanager
async def _memory_process() -> AsyncIterator[Registry]:
    ours, its = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve_memory, args=(its,))
    process.start()
    try:
        port = await asyncio.to_thread(ours.recv)
        async with EtcdRegistry(EtcdConfig(endpoints=(f"127.0.0.1:{port}",))) as client:
            yield client
    finally:
        process.terminate()
        process.join()


def _serve_memory(connection: Connection) -> None:
    async def serve() -> None:
        # Held: it stops when nobody refers to it.
        server = RegistryServer(served_registry())
        connection.send(await server.start("127.0.0.1", 0))
        await asyncio.Event().wait()

    asyncio.run(serve())
