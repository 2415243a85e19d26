"""Recorded requests: when each arrived, how long its prompt was, how many tokens came back.

Formats, told by the name:
    .csv               TIMESTAMP, ContextTokens, GeneratedTokens (Azure LLM inference traces); TIMESTAMP may be missing
    .jsonl             input_length, output_length, timestamp in ms (Mooncake); timestamp may be missing
    *-trace.csv beside *-dataset.json, or a folder of such pairs (ServeGen): rates of windows and distributions of
                       lengths, from which requests are drawn with a fixed seed
"""

import ast
import csv
import heapq
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

# A day of the busiest published client is a hundred times this; an hour of it decides the same buckets.
MAX_DRAWN_REQUESTS = 20_000
_SEED = 0


class TraceError(ValueError):
    """A trace that cannot be read; names file, row and what is expected there."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    arrival_s: float | None
    """After some start; None where the trace has no times."""
    prompt_tokens: int
    output_tokens: int


def read_trace(path: Path) -> list[TraceRequest]:
    """Every request, by arrival where there are times. Raises TraceError."""
    if path.is_dir() or path.name.endswith("-trace.csv"):
        return _read_servegen(path)
    readers: dict[str, Callable[[Path], Iterator[tuple[int, TraceRequest]]]] = {".csv": _azure, ".jsonl": _mooncake}
    if path.suffix not in readers:
        raise TraceError(
            f"workload {path} must be a .csv or .jsonl file, or a folder of *-trace.csv and *-dataset.json"
        )
    if not path.is_file():
        raise TraceError(f"workload {path} does not exist")
    found: list[TraceRequest] = []
    for row, request in readers[path.suffix](path):
        if request.prompt_tokens < 1 or request.output_tokens < 0:
            raise TraceError(
                f"workload {path}, row {row}: {request.prompt_tokens} prompt and {request.output_tokens} output tokens;"
                " needs at least 1 and 0"
            )
        if found and (request.arrival_s is None) != (found[0].arrival_s is None):
            raise TraceError(f"workload {path}, row {row}: some requests have a time and some have none")
        found.append(request)
    if not found:
        raise TraceError(f"workload {path} holds no request")
    return sorted(found, key=lambda request: request.arrival_s or 0.0)


def _azure(path: Path) -> Iterator[tuple[int, TraceRequest]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        for index, row in enumerate(rows, 2):
            try:
                # Seven digits of fractions; datetime reads six.
                stamp = row.get("TIMESTAMP")
                arrival = datetime.fromisoformat(stamp[:26]).replace(tzinfo=UTC).timestamp() if stamp else None
                request = TraceRequest(arrival, int(row["ContextTokens"]), int(row["GeneratedTokens"]))
            except (KeyError, ValueError, TypeError) as err:
                raise TraceError(
                    f"workload {path}, row {index}: needs ContextTokens, GeneratedTokens and, if any, an ISO TIMESTAMP"
                    f" ({err!r})"
                ) from err
            yield index, request


def _mooncake(path: Path) -> Iterator[tuple[int, TraceRequest]]:
    with path.open(encoding="utf-8-sig") as file:
        for index, line in enumerate(file, 1):
            try:
                row: Mapping[str, Any] = json.loads(line)
                stamp = row.get("timestamp")
                arrival = float(stamp) / 1000 if stamp is not None else None
                if arrival is not None and not math.isfinite(arrival):
                    raise ValueError(f"timestamp {stamp}")
                request = TraceRequest(arrival, int(row["input_length"]), int(row["output_length"]))
            except (KeyError, ValueError, TypeError, AttributeError) as err:
                raise TraceError(
                    f"workload {path}, row {index}: needs input_length, output_length and, if any, a timestamp in ms"
                    f" ({err!r})"
                ) from err
            yield index, request


@dataclass(frozen=True, kw_only=True, slots=True)
class _Window:
    """Arrivals from ``start_s`` to the next window: gaps of this distribution and shape, at ``rate`` a second."""

    start_s: float
    rate: float
    distribution: str
    shape: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Lengths:
    """Token counts and how likely each is, from ``start_s`` of the day on."""

    start_s: float
    text: Mapping[int, float]
    image: Mapping[int, float]
    images: Mapping[int, float]
    output: Mapping[int, float]


def _servegen_traces(path: Path) -> list[Path]:
    traces = sorted(path.glob("*-trace.csv")) if path.is_dir() else [path]
    if not traces or not traces[0].is_file():
        raise TraceError(f"workload {path} holds no *-trace.csv")
    return traces


def _read_servegen(path: Path) -> list[TraceRequest]:
    clients = []
    for trace in _servegen_traces(path):
        dataset = trace.with_name(trace.name.removesuffix("-trace.csv") + "-dataset.json")
        clients.append(_draw(_windows(trace), _lengths(dataset), random.Random(f"{_SEED}-{trace.name}")))
    drawn = list(islice(heapq.merge(*clients, key=lambda request: request.arrival_s or 0.0), MAX_DRAWN_REQUESTS))
    if not drawn:
        raise TraceError(f"workload {path} holds no request: every window's rate is 0")
    return drawn


def read_rates(path: Path) -> list[float]:
    """Requests a second in each window of a ServeGen trace, of all its clients together. Raises TraceError."""
    clients = [_windows(trace) for trace in _servegen_traces(path)]
    starts = [window.start_s for window in clients[0]]
    widths = {round(end - begin, 3) for begin, end in pairwise(starts)}
    if len(widths) != 1 or any([window.start_s for window in client] != starts for client in clients):
        raise TraceError(f"workload {path} needs windows of one width, two at least and the same for all clients")
    rates = [sum(window.rate for window in windows) for windows in zip(*clients, strict=True)]
    if not any(rates):
        raise TraceError(f"workload {path} holds no request: every window's rate is 0")
    return rates


def _windows(path: Path) -> list[_Window]:
    windows: list[_Window] = []
    with path.open(newline="") as file:
        for index, row in enumerate(csv.reader(file), 1):
            try:
                start, rate, _, kind, shape, _ = row
                window = _Window(
                    start_s=float(start),
                    rate=float(rate),
                    distribution=kind,
                    shape=float(shape) if kind in ("Gamma", "Weibull") else 1.0,
                )
                if window.rate < 0 or window.shape <= 0 or kind not in ("", "Gamma", "Weibull"):
                    raise ValueError(f"rate {rate}, distribution {kind!r}, shape {shape}")
            except ValueError as err:
                raise TraceError(
                    f"workload {path}, row {index}: needs start, rate, variation, Gamma or Weibull or nothing, shape,"
                    f" scale ({err})"
                ) from err
            if windows and window.start_s <= windows[-1].start_s:
                raise TraceError(f"workload {path}, row {index}: windows must ascend")
            windows.append(window)
    return windows


def _lengths(path: Path) -> list[_Lengths]:
    try:
        values = json.loads(path.read_text())
        found = [
            _Lengths(
                start_s=float(start),
                text=_distribution(entry["text_tokens"]),
                image=_distribution(entry["image_tokens"]),
                images=_distribution(entry["image_count"]),
                output=_distribution(entry["output_tokens"]),
            )
            for start, entry in values.items()
        ]
    except OSError as err:
        raise TraceError(f"workload {path}: {err.strerror}; it belongs to the trace beside it") from err
    except (KeyError, ValueError, TypeError, AttributeError, SyntaxError) as err:
        raise TraceError(
            f"workload {path}: needs, by second of the day, text_tokens, image_tokens, image_count and output_tokens"
            f" as {{value: probability}} ({err!r})"
        ) from err
    if not found:
        raise TraceError(f"workload {path} holds no distribution")
    return sorted(found, key=lambda lengths: lengths.start_s)


def _distribution(text: str) -> dict[int, float]:
    """From the text of a Python dict, as the data set writes it."""
    values = {int(key): float(share) for key, share in ast.literal_eval(text).items()}
    if not values or min(values.values()) < 0 or sum(values.values()) <= 0:
        raise ValueError(f"no probabilities in {text[:40]!r}")
    return values


def _draw(windows: list[_Window], lengths: list[_Lengths], rng: random.Random) -> Iterator[TraceRequest]:
    """Requests of one client in order of arrival."""
    # Outside the last window's start there is as much time as between the two before it.
    width = windows[-1].start_s - windows[-2].start_s if len(windows) > 1 else 600.0
    ends = [window.start_s for window in windows[1:]] + [windows[-1].start_s + width] if windows else []
    for window, end in zip(windows, ends, strict=True):
        if window.rate == 0:
            continue
        now = window.start_s + _gap(window, rng)
        while now < end:
            at = max(
                (entry for entry in lengths if entry.start_s <= now % 86400), key=lambda e: e.start_s, default=None
            )
            yield _request(now, at or lengths[-1], rng)
            now += _gap(window, rng)


def _gap(window: _Window, rng: random.Random) -> float:
    """A gap of mean 1 / rate."""
    if window.distribution == "Gamma":
        return rng.gammavariate(window.shape, 1 / (window.shape * window.rate))
    if window.distribution == "Weibull":
        return rng.weibullvariate(1 / (window.rate * math.gamma(1 + 1 / window.shape)), window.shape)
    return rng.expovariate(window.rate)


def _request(now: float, lengths: _Lengths, rng: random.Random) -> TraceRequest:
    def pick(values: Mapping[int, float]) -> int:
        return rng.choices(list(values), weights=list(values.values()))[0]

    prompt = pick(lengths.text) + sum(pick(lengths.image) for _ in range(pick(lengths.images)))
    return TraceRequest(now, max(1, prompt), pick(lengths.output))


def has_times(requests: Iterable[TraceRequest]) -> bool:
    """Whether the trace says when requests arrived; all of them do or none."""
    return all(request.arrival_s is not None for request in requests)
