"""Requests of a simulation, and what became of them."""

import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from xllm_compile.request_trace import TraceError, TraceRequest, has_times, read_trace


@dataclass(eq=False, kw_only=True, slots=True)
class SimRequest:
    """One request. It ends after ``num_output_tokens``, which nobody but the simulation knows."""

    number: int
    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    is_offline: bool = False
    priority: int = 0
    is_begun: bool = False
    """Whether another instance had it: it goes first where it goes on."""
    max_output_tokens: int = 2048
    """As its client says, and so the gateway."""
    queued_s: float = 0.0
    """When it reached the instance that it is on."""
    prefill: str = ""
    """Instance, likewise decode."""
    decode: str = ""
    predicted_ttft_s: float = 0.0
    num_generated: int = 0
    num_computed: int = 0
    """Tokens in the KV cache, of prompt and generated ones, while it is prefilled."""
    num_preemptions: int = 0
    first_token_s: float | None = None
    finished_s: float | None = None
    is_refused: bool = False

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_generated

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens to prefill."""
        return self.num_tokens - self.num_computed

    @property
    def num_growth_tokens(self) -> int:
        """Tokens to come but the last, at most."""
        return max(0, self.max_output_tokens - self.num_generated - 1)

    @property
    def first_deadline_s(self) -> float:
        """When its first token is due by the clock of its instance, as runtime/policies/state.py has it."""
        if self.num_generated:
            return float("-inf")
        return float("inf") if self.ttft_slo_s is None else self.queued_s + self.ttft_slo_s

    @property
    def next_due_s(self) -> float:
        """When its next token is due by its TPOT target."""
        if self.first_token_s is None or self.tpot_slo_s is None:
            return float("inf")
        return self.first_token_s + self.num_generated * self.tpot_slo_s

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float:
        """0 for a single token, infinity for one that was not finished."""
        if self.first_token_s is None or self.finished_s is None:
            return float("inf")
        return (self.finished_s - self.first_token_s) / max(1, self.num_output_tokens - 1)

    @property
    def is_met(self) -> bool:
        """Whether it was served within both of its targets."""
        ttft_s = self.ttft_s
        if ttft_s is None or self.finished_s is None:
            return False
        in_time = self.ttft_slo_s is None or ttft_s <= self.ttft_slo_s
        return in_time and (self.tpot_slo_s is None or self.tpot_s <= self.tpot_slo_s)


def read_requests(path: Path, max_requests: int | None = None) -> list[TraceRequest]:
    """Of a trace with times, from 0 on. Raises TraceError."""
    requests = read_trace(path)[:max_requests]
    if not has_times(requests) or requests[-1].arrival_s == requests[0].arrival_s:
        raise TraceError(f"trace {path} has no arrival times; without them nothing can be simulated")
    start = requests[0].arrival_s or 0.0
    return [
        replace(one, arrival_s=(one.arrival_s or 0.0) - start, output_tokens=max(1, one.output_tokens))
        for one in requests
    ]


def scaled(trace: Sequence[TraceRequest], rate: float, seed: int) -> list[TraceRequest]:
    """The whole trace in order, at ``rate`` requests a second on average. The seed says where it begins."""
    length_s = trace[-1].arrival_s or 0.0
    # The last request is followed by the first one after a gap of the mean length.
    length_s *= len(trace) / (len(trace) - 1)
    factor = len(trace) / length_s / rate
    begin = random.Random(seed).randrange(len(trace)) if seed else 0
    start = trace[begin].arrival_s or 0.0
    turned = [*trace[begin:], *(replace(one, arrival_s=(one.arrival_s or 0.0) + length_s) for one in trace[:begin])]
    return [replace(one, arrival_s=((one.arrival_s or 0.0) - start) * factor) for one in turned]


def tidal(trace: Sequence[TraceRequest], rates: Sequence[float]) -> list[TraceRequest]:
    """The trace in as much time, with arrivals moved so that its rate follows ``rates``, of equal parts of that time.

    One at least is above 0.
    """
    length_s = trace[-1].arrival_s or 1.0
    came = [0.0, *accumulate(rates)]
    # Share of all requests that came by the end of each part; the last is 1, however sums round.
    done = [count / came[-1] for count in came]

    def moved(share: float) -> float:
        if not share:
            return 0.0
        part = bisect_left(done, share)
        return (part - 1 + (share - done[part - 1]) / (done[part] - done[part - 1])) / len(rates)

    return [replace(one, arrival_s=length_s * moved((one.arrival_s or 0.0) / length_s)) for one in trace]


def offline(
    lengths: Sequence[TraceRequest], rate: float, until_s: float, seed: int, *, first_number: int, gives_way: bool
) -> list[SimRequest]:
    """Requests without targets at a steady rate, their lengths drawn from a trace."""
    rng = random.Random(f"offline-{seed}")
    found: list[SimRequest] = []
    now = rng.expovariate(rate) if rate else until_s
    while now < until_s:
        one = rng.choice(lengths)
        found.append(
            SimRequest(
                number=first_number + len(found),
                arrival_s=now,
                num_prompt_tokens=one.prompt_tokens,
                num_output_tokens=one.output_tokens,
                is_offline=gives_way,
            )
        )
        now += rng.expovariate(rate)
    return found


def online(trace: Sequence[TraceRequest], ttft_slo_s: float, tpot_slo_s: float) -> list[SimRequest]:
    return [
        SimRequest(
            number=number,
            arrival_s=one.arrival_s or 0.0,
            num_prompt_tokens=one.prompt_tokens,
            num_output_tokens=one.output_tokens,
            ttft_slo_s=ttft_slo_s,
            tpot_slo_s=tpot_slo_s,
        )
        for number, one in enumerate(trace)
    ]
