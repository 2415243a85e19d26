"""Requests to send: when, how long the prompt, how many tokens back. From fixed lengths or from a recorded trace."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from xllm_compile.request_trace import has_times, read_trace

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


def mixed_lengths(rng: random.Random) -> tuple[int, int]:
    """Tokens of a prompt, 16 to 1,024, and of its output, 8 to 128: log-normal, means near 300 and 70."""
    prompt_tokens = min(1024, max(16, round(rng.lognormvariate(math.log(256), 0.7))))
    return prompt_tokens, min(128, max(8, round(rng.lognormvariate(math.log(64), 0.5))))


def mixed_requests(count: int, *, rate: float | None, seed: int) -> list[PlannedRequest]:
    """Of mixed lengths; a higher rate packs the same requests closer, None sends all at once."""
    rng = random.Random(seed)
    requests, now = [], 0.0
    for _ in range(count):
        prompt_tokens, output_tokens = mixed_lengths(rng)
        requests.append(PlannedRequest(arrival_s=now, prompt_tokens=prompt_tokens, output_tokens=output_tokens))
        gap = rng.expovariate(1.0)
        now += gap / rate if rate else 0.0
    return requests


def trace_requests(path: Path, *, limit: int, max_model_len: int, speedup: float = 1.0) -> list[PlannedRequest]:
    """The first ``limit`` requests of a trace that fit the model, with its own gaps divided by ``speedup``.

    Raises TraceError for a trace that cannot be read, ValueError for one without arrival times or a request that fits.
    """
    requests = read_trace(path)
    if not has_times(requests):
        raise ValueError(f"trace {path} has no arrival times; give lengths and a rate instead")
    fitting = [
        request
        for request in requests
        if request.output_tokens >= 1 and request.prompt_tokens + request.output_tokens <= max_model_len
    ][:limit]
    if not fitting:
        raise ValueError(f"trace {path} holds no request of at most {max_model_len} tokens; raise --max-model-len")
    start = fitting[0].arrival_s or 0.0
    return [
        PlannedRequest(
            arrival_s=((request.arrival_s or 0.0) - start) / speedup,
            prompt_tokens=request.prompt_tokens,
            output_tokens=request.output_tokens,
        )
        for request in fitting
    ]


def all_at_once(requests: Sequence[PlannedRequest]) -> list[PlannedRequest]:
    """The same requests without their arrival times: for runs that keep a number of streams busy instead."""
    return [replace(request, arrival_s=0.0) for request in requests]


def prompt_of(request: PlannedRequest, index: int, *, vocab_size: int, seed: int) -> TokenIds:
    """Random token ids, the same for the same index and seed, different between requests."""
    rng = random.Random(f"{seed}-{index}")
    return [rng.randrange(vocab_size) for _ in range(request.prompt_tokens)]
