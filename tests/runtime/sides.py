"""Engines that move KV between each other, each stepped by the test."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.runtime.fakes import HistoryRunner
from xllm_compile.runtime.engine import Engine
from xllm_compile.runtime.hand_over import HandOver
from xllm_compile.runtime.outputs import RequestOutput
from xllm_compile.runtime.reservations import Reservation, ReservationRequest
from xllm_compile.runtime.resume import Resume
from xllm_compile.runtime.sampling_params import RequestOutputKind, SamplingParams

PROMPT = list(range(60, 85))
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "output_kind": RequestOutputKind.DELTA}


def room_for(name: str, token_ids: Sequence[int], timeout_s: float = 60.0, **more: Any) -> ReservationRequest:
    return ReservationRequest(reservation_id=name, token_ids=tuple(token_ids), timeout_s=timeout_s, **more)


@dataclass
class Clock:
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Side:
    """An engine, and what it reports."""

    engine: Engine
    runner: HistoryRunner
    clock: Clock
    outputs: dict[str, list[RequestOutput]] = field(default_factory=dict)
    event: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.engine.watch(self.event.set)

    def step(self) -> None:
        for output in self.engine.step():
            self.outputs.setdefault(output.request_id, []).append(output)

    def reserve(self, name: str, token_ids: Sequence[int], timeout_s: float = 10.0, **more: Any) -> Reservation:
        return self.engine.reserve(room_for(name, token_ids, timeout_s, **more))

    def run_until(self, is_done: Callable[[], bool]) -> None:
        """As the engine's thread does it: step while there is work, sleep until other threads have something."""
        while not is_done():
            self.event.clear()
            self.engine.tend()
            if self.engine.has_work:
                self.step()
            elif not is_done():
                assert self.event.wait(timeout=60)

    def run(self, name: str) -> list[RequestOutput]:
        self.run_until(lambda: bool(self.outputs.get(name)) and self.outputs[name][-1].finished)
        return self.outputs.pop(name)

    def rest(self) -> None:
        """Until nothing is held any more."""
        self.run_until(lambda: self.is_empty)

    @property
    def is_empty(self) -> bool:
        stats = self.engine.stats()
        assert stats.reservations is not None and stats.hand_overs is not None
        num_held = stats.reservations.num_open + stats.hand_overs.num_open + stats.num_running + stats.num_waiting
        return (
            num_held == 0 and not self.engine.has_work and stats.kv_tokens_used == 0 and stats.kv_pages["mapped"] == 0
        )

    def decode(self, reservation_id: str, tokens: list[int], num_kv_tokens: int, **options: Any) -> list[int]:
        """Resume there; the tokens that it adds."""
        resume = Resume(output_token_ids=tokens, reservation_id=reservation_id, num_kv_tokens=num_kv_tokens)
        params = SamplingParams(**{"max_tokens": 10} | GREEDY | options)
        request = self.engine.make_request("decode", PROMPT, params, resume=resume)
        claimed = self.engine.claim(request)
        if claimed is not None:
            claimed.result(timeout=60)
        self.engine.add(request)
        return tokens_of(self.run("decode"))

    @property
    def num_computed(self) -> int:
        return sum(len(step.token_ids) for step in self.runner.steps)


def tokens_of(outputs: list[RequestOutput]) -> list[int]:
    return [token for output in outputs for completion in output.outputs for token in completion.token_ids]


def target_of(reservation: Reservation) -> HandOver:
    return HandOver(
        transfers=reservation.transfers,
        token=reservation.token,
        num_cached_tokens=reservation.num_cached_tokens,
        page_offsets=reservation.page_offsets,
        page_bytes=reservation.page_bytes,
        num_tokens=reservation.num_tokens,
    )


def prefill(side: Side, target: HandOver, name: str = "prefill", **options: Any) -> None:
    params = SamplingParams(**{"max_tokens": 10} | GREEDY | options)
    side.engine.add(side.engine.make_request(name, PROMPT, params, hand_over=target))


MakeSide = Callable[..., Side]
