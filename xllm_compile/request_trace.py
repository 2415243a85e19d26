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
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any, TextIO, TypeVar

# A day of the busiest published client is a hundred times this; an hour of it decides the same buckets.
MAX_DRAWN_REQUESTS = 20_000
# Of a prompt or an output. No model takes more; a replay of what is none, such as a time in its column, takes hours.
MAX_TOKENS = 10_000_000
_MAX_IMAGES = 1_000
# Flatter distributions of gaps have moments that a float cannot hold.
_LEAST_SHAPE = 0.01
_SEED = 0
# What a parser of one row raises for a bad one; int() of an infinity overflows.
_BAD_VALUE = (KeyError, ValueError, TypeError, AttributeError, OverflowError)


_Row = TypeVar("_Row")


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
        if not (1 <= request.prompt_tokens <= MAX_TOKENS and 0 <= request.output_tokens <= MAX_TOKENS):
            raise TraceError(
                f"workload {path}, row {row}: {request.prompt_tokens} prompt and {request.output_tokens} output tokens;"
                f" needs at least 1 and 0, and at most {MAX_TOKENS}"
            )
        if found and (request.arrival_s is None) != (found[0].arrival_s is None):
            raise TraceError(f"workload {path}, row {row}: some requests have a time and some have none")
        found.append(request)
    if not found:
        raise TraceError(f"workload {path} holds no request")
    return sorted(found, key=lambda request: request.arrival_s or 0.0)


def _azure(path: Path) -> Iterator[tuple[int, TraceRequest]]:
    with _open(path) as file:
        for index, row in _csv_rows(path, csv.DictReader(file), first=2):
            try:
                # Seven digits of fractions; datetime reads six.
                stamp = row.get("TIMESTAMP")
                arrival = datetime.fromisoformat(stamp[:26]).replace(tzinfo=UTC).timestamp() if stamp else None
                request = TraceRequest(arrival, int(row["ContextTokens"]), int(row["GeneratedTokens"]))
            except _BAD_VALUE as err:
                raise TraceError(
                    f"workload {path}, row {index}: needs ContextTokens, GeneratedTokens and, if any, an ISO TIMESTAMP"
                    f" ({err!r})"
                ) from err
            yield index, request


def _mooncake(path: Path) -> Iterator[tuple[int, TraceRequest]]:
    with _open(path) as file:
        for index, line in enumerate(file, 1):
            try:
                row: Mapping[str, Any] = json.loads(line)
                stamp = row.get("timestamp")
                arrival = float(stamp) / 1000 if stamp is not None else None
                if arrival is not None and not math.isfinite(arrival):
                    raise ValueError(f"timestamp {stamp}")
                request = TraceRequest(arrival, _count(row["input_length"]), _count(row["output_length"]))
            except _BAD_VALUE as err:
                raise TraceError(
                    f"workload {path}, row {index}: needs input_length, output_length and, if any, a timestamp in ms"
                    f" ({err!r})"
                ) from err
            yield index, request


def _open(path: Path) -> TextIO:
    """For reading row by row: a byte that is no text shows in its row, whose parser then refuses it by number."""
    return path.open(newline="", encoding="utf-8-sig", errors="backslashreplace")


def _csv_rows(path: Path, rows: Iterator[_Row], *, first: int) -> Iterator[tuple[int, _Row]]:
    """The rows with their numbers from ``first`` on. Raises TraceError for what is no csv."""
    for index in count(first):
        try:
            row = next(rows, None)
        except csv.Error as err:
            raise TraceError(f"workload {path}, row {index}: {err}") from err
        if row is None:
            return
        yield index, row


def _count(value: Any) -> int:
    """Raises ValueError, TypeError or OverflowError for what is no whole number."""
    number = int(value)
    if number != value and not isinstance(value, str):
        raise ValueError(f"{value} is no whole number")
    return number


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
    with _open(path) as file:
        for index, row in _csv_rows(path, csv.reader(file), first=1):
            try:
                start, rate, _, kind, shape, _ = row
                window = _Window(
                    start_s=float(start),
                    rate=float(rate),
                    distribution=kind,
                    shape=float(shape) if kind in ("Gamma", "Weibull") else 1.0,
                )
                is_finite = all(map(math.isfinite, (window.start_s, window.rate, window.shape)))
                is_known = kind in ("", "Gamma", "Weibull")
                if not (is_finite and is_known and window.rate >= 0 and window.shape >= _LEAST_SHAPE):
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
                images=_distribution(entry["image_count"], _MAX_IMAGES),
                output=_distribution(entry["output_tokens"]),
            )
            for start, entry in values.items()
        ]
    except OSError as err:
        raise TraceError(f"workload {path}: {err.strerror}; it belongs to the trace beside it") from err
    except (*_BAD_VALUE, SyntaxError) as err:
        raise TraceError(
            f"workload {path}: needs, by second of the day, text_tokens, image_tokens, image_count and output_tokens"
            f" as {{value: probability}} ({err!r})"
        ) from err
    if not found:
        raise TraceError(f"workload {path} holds no distribution")
    return sorted(found, key=lambda lengths: lengths.start_s)


def _distribution(text: str, most: int = MAX_TOKENS) -> dict[int, float]:
    """Of values up to ``most``, from the text of a Python dict, as the data set writes it."""
    values = {int(key): float(share) for key, share in ast.literal_eval(text).items()}
    if not values or min(values.values()) < 0 or not 0 < sum(values.values()) < math.inf:
        raise ValueError(f"no probabilities in {text[:40]!r}")
    if min(values) < 0 or max(values) > most:
        raise ValueError(f"values must be in [0, {most}], not {min(values)} to {max(values)}")
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
