"""KV from one process to another by each way, against the machine's own limits in the same run.

The limits: copying within one process, by libc and past the caches, and plain bytes over loopback TCP.
"""

import ctypes
import json
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from xllm_compile.benchmarks.console import finish, say, show_table
from xllm_compile.benchmarks.record import Bar, make_record
from xllm_compile.benchmarks.timing import Summary, measure_in_turns
from xllm_compile.benchmarks.transfer_receiver import CONFIG, present_pages
from xllm_compile.runtime.memory.cpu_memory import HUGE_PAGE_BYTES
from xllm_compile.runtime.ops import native
from xllm_compile.runtime.transfer.connect import SCHEMES, connect
from xllm_compile.runtime.transfer.mapping import Mapping as RegionMapping
from xllm_compile.runtime.transfer.transfer import ByteRange

LARGE_BYTES = 64 << 20
SMALL_BYTES = (64, 4 << 10, 64 << 10, 1 << 20)
# Rounds write to parts of it in turn: no cache holds them.
REGION_BYTES = 4 * LARGE_BYTES
_BARS_GB_PER_S = {"shm": 15, "tcp": 3}
_NEEDS = {"mooncake": "mooncake", "nixl": "nixl_cu12"}
Write = Callable[[int, int, int], None]
"""(offset, num_bytes, bytes in one piece)"""


def run_transfer(results: Path, command: Sequence[str], *, rounds: int, small_rounds: int) -> None:
    """Measure and write transfer.json."""
    schemes = [scheme for scheme in SCHEMES if scheme not in _NEEDS or find_spec(_NEEDS[scheme])]
    with tempfile.TemporaryDirectory() as folder:
        say("building the kernels")
        kernels = Path(folder) / "kernels.so"
        native.build_kernels(kernels)
        with open_ways(kernels, schemes, REGION_BYTES) as ways:
            large = measure_sizes(ways, LARGE_BYTES, rounds)
            small = {size: measure_sizes(ways, size, small_rounds) for size in SMALL_BYTES}
    rates = {name: LARGE_BYTES / summary.median / 1e9 for name, summary in large.items()}
    best = {name: LARGE_BYTES / summary.min / 1e9 for name, summary in large.items()}
    show_table(
        "64 MiB in pages of 2 MiB, GB/s; and microseconds by size",
        ("", "median", "best", *(f"{size} B" for size in SMALL_BYTES)),
        [
            (
                name,
                f"{rates[name]:.2f}",
                f"{best[name]:.2f}",
                *(f"{small[size][name].median * 1e6:.1f}" for size in small),
            )
            for name in ways
        ],
    )
    limit = {"shm": "copy past the caches", "tcp": "plain TCP"}
    bars = []
    for scheme in schemes:
        bar = f">= {_BARS_GB_PER_S[scheme]}" if scheme in _BARS_GB_PER_S else ""
        bars.append(Bar(what=f"{scheme}, 64 MiB in pages of 2 MiB", value=rates[scheme], unit="GB/s", bar=bar))
        against = limit.get(scheme, limit["tcp"])
        ratio = Summary(values=_ratios(large[against], large[scheme])).median
        bars.append(Bar(what=f"{scheme} against {against}, 64 MiB", value=ratio, unit="x its rate"))
        for size in SMALL_BYTES:
            bars.append(Bar(what=f"{scheme}, {size} bytes", value=small[size][scheme].median * 1e6, unit="us"))
    for name in ("copy by libc", "copy past the caches", "plain TCP"):
        bars.append(Bar(what=f"limit: {name}, 64 MiB", value=rates[name], unit="GB/s"))
    raw = {
        "seconds_64MiB": {name: summary.to_json() for name, summary in large.items()},
        "seconds_by_size": {
            str(size): {name: summary.to_json() for name, summary in by_way.items()} for size, by_way in small.items()
        },
    }
    finish(make_record("transfer", command, seed=0, raw=raw, bars=bars), results)


@contextmanager
def open_ways(kernels: Path, schemes: Sequence[str], region_bytes: int) -> Iterator[dict[str, Write]]:
    """A process that receives, and a function for each way to write to it; and the limits."""
    native.load_kernels(kernels)
    token = secrets.token_bytes(16)
    command = [sys.executable, "-m", "xllm_compile.benchmarks.transfer_receiver", str(kernels)]
    options = ["--bytes", str(region_bytes), "--token", token.hex(), "--schemes", *schemes]
    memory, other = present_pages(region_bytes), present_pages(region_bytes)
    with ExitStack() as stack:
        receiver = stack.enter_context(
            subprocess.Popen([*command, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        assert receiver.stdout is not None
        ready = json.loads(receiver.stdout.readline())
        source, target = (stack.enter_context(_mapped(one.region)) for one in (memory, other))
        ctypes.memset(source.address, 1, region_bytes)
        ways: dict[str, Write] = {
            "copy by libc": partial(_copy, ctypes.memmove, target.address, source.address),
            "copy past the caches": partial(_copy, native.copy_bytes(), target.address, source.address),
        }
        plain = stack.enter_context(socket.create_connection(("127.0.0.1", ready["plain_port"])))
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ways["plain TCP"] = partial(_send_plain, plain, source)
        for scheme in schemes:
            sender = connect(ready["addresses"], memory.region, CONFIG, [scheme])
            stack.callback(sender.close)
            ways[scheme] = partial(_write, sender.write, token)
        yield ways


def measure_sizes(
    ways: Mapping[str, Write], num_bytes: int, rounds: int, region_bytes: int = REGION_BYTES
) -> dict[str, Summary]:
    say(f"{num_bytes} bytes, {rounds} rounds")
    offsets = dict.fromkeys(ways, 0)

    def run(name: str) -> None:
        offset = offsets[name]
        offsets[name] = (offset + max(num_bytes, HUGE_PAGE_BYTES)) % region_bytes
        ways[name](offset, num_bytes, HUGE_PAGE_BYTES)

    # The first rounds touch every page.
    warmup = region_bytes // max(num_bytes, HUGE_PAGE_BYTES)
    return measure_in_turns({name: partial(run, name) for name in ways}, warmup=warmup, repeats=rounds)


def _pieces(offset: int, num_bytes: int, piece: int) -> Iterator[tuple[int, int]]:
    for begin in range(offset, offset + num_bytes, piece):
        yield begin, min(piece, offset + num_bytes - begin)


def _copy(copy: Callable[[int, int, int], Any], target: int, source: int, offset: int, size: int, piece: int) -> None:
    for begin, num_bytes in _pieces(offset, size, piece):
        copy(target + begin, source + begin, num_bytes)


def _write(write: Callable[..., None], token: bytes, offset: int, size: int, piece: int) -> None:
    write(
        token, [ByteRange(source=at, target=at, num_bytes=num_bytes) for at, num_bytes in _pieces(offset, size, piece)]
    )


def _send_plain(plain: socket.socket, source: RegionMapping, offset: int, size: int, piece: int) -> None:
    plain.sendall(size.to_bytes(8, "little"))
    for begin, num_bytes in _pieces(offset, size, piece):
        plain.sendall(source.view(begin, num_bytes))
    plain.recv(1)


@contextmanager
def _mapped(region: Any) -> Iterator[RegionMapping]:
    mapping = RegionMapping(region, is_writable=True)
    yield mapping
    mapping.close()


def _ratios(limit: Summary, measured: Summary) -> tuple[float, ...]:
    """Of rates, round by round."""
    return tuple(a / b for a, b in zip(limit.values, measured.values, strict=True))
