"""Requests to send: when, how long the prompt, how many tokens back. From fixed lengths or from a recorded trace."""

import csv
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

TokenIds = list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRequest:
    arrival_s: float
    """After the start of the run."""
    prompt_tokens: int
    output_tokens: int

    def __post_init__(self) -> None:
        if self.arrival_s < 0 or self.prompt_tokens < 1 or self.output_tokens < 1:
            raise ValueError(f"{self} needs an arrival of at least 0 and at least one token each way")


def fixed_requests(
    count: int, prompt_tokens: int, output_tokens: int, *, rate: float | None, seed: int
) -> list[PlannedRequest]:
    """``count`` equal requests: all at once, or with exponential gaps (a Poisson process) at ``rate`` per second."""
    rng = random.Random(seed)
    arrivals, now = [], 0.0
    for _ in range(count):
        arrivals.append(now)
        now += rng.expovariate(rate) if rate else 0.0
    return [
        PlannedRequest(arrival_s=arrival, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        for arrival in arrivals
    ]


def trace_requests(path: Path, *, limit: int, max_model_len: int, speedup: float = 1.0) -> list[PlannedRequest]:
    """The first ``limit`` requests of a trace that fit the model, with its own gaps divided by ``speedup``.

    .csv has TIMESTAMP, ContextTokens and GeneratedTokens (Azure); .jsonl has timestamp in ms, input_length and
    output_length (Mooncake). Raises ValueError naming file and request.
    """
    readers = {".csv": _azure_rows, ".jsonl": _mooncake_rows}
    if path.suffix not in readers:
        raise ValueError(f"trace {path} must be a .csv or .jsonl file")
    if not path.is_file():
        raise ValueError(f"trace {path} does not exist")
    found: list[PlannedRequest] = []
    start = None
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = readers[path.suffix](file)
        for index in range(1, 1 << 62):
            try:
                second, prompt_tokens, output_tokens = next(rows)
            except StopIteration:
                break
            except (KeyError, ValueError, TypeError) as err:
                raise ValueError(f"trace {path}, request {index} cannot be read: {err!r}") from err
            if prompt_tokens < 1 or output_tokens < 1 or prompt_tokens + output_tokens > max_model_len:
                continue
            start = second if start is None else start
            arrival = max(0.0, second - start) / speedup
            found.append(PlannedRequest(arrival_s=arrival, prompt_tokens=prompt_tokens, output_tokens=output_tokens))
            if len(found) == limit:
                break
    if not found:
        raise ValueError(f"trace {path} holds no request of at most {max_model_len} tokens; raise --max-model-len")
    return found


def all_at_once(requests: Sequence[PlannedRequest]) -> list[PlannedRequest]:
    """The same requests without their arrival times: for runs that keep a number of streams busy instead."""
    return [replace(request, arrival_s=0.0) for request in requests]


def prompt_of(request: PlannedRequest, index: int, *, vocab_size: int, seed: int) -> TokenIds:
    """Random token ids, the same for the same index and seed, different between requests."""
    rng = random.Random(f"{seed}-{index}")
    return [rng.randrange(vocab_size) for _ in range(request.prompt_tokens)]


Row = tuple[float, int, int]


def _azure_rows(file: Any) -> Iterator[Row]:
    for row in csv.DictReader(file):
        # Seven digits of fractions; datetime reads six.
        stamp = datetime.fromisoformat(row["TIMESTAMP"][:26])
        yield stamp.timestamp(), int(row["ContextTokens"]), int(row["GeneratedTokens"])


def _mooncake_rows(file: Any) -> Iterator[Row]:
    for line in file:
        row: Mapping[str, Any] = json.loads(line)
        yield float(row["timestamp"]) / 1000, int(row["input_length"]), int(row["output_length"])
