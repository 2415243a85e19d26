"""Receivers of KV that cannot be reached: what is sent to others, and when they are tried again."""

import threading
from collections.abc import Iterator, Sequence

import pytest

from tests.runtime.sides import Clock
from xllm_compile.runtime.hand_over import HandOver, HandOvers, Push
from xllm_compile.runtime.transfer.transfer import ByteRange, UnreachableError


class FakeSender:
    """Takes writes, holds them or fails them, as its address says."""

    def __init__(self, address: str, gate: threading.Event) -> None:
        self.address = address
        self.num_writes = 0
        self._gate = gate

    def write(self, token: bytes, ranges: Sequence[ByteRange]) -> None:
        self.num_writes += 1
        if self.address == "cut off":
            assert self._gate.wait(60)
            raise UnreachableError("no progress")

    def close(self) -> None:
        pass


@pytest.fixture
def pushes() -> Iterator["Pushes"]:
    made = Pushes()
    yield made
    made.gate.set()
    made.hand_overs.close()


class Pushes:
    """Of 10 bytes each, one token."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.gate = threading.Event()
        self.senders: dict[str, FakeSender] = {}
        self.hand_overs = HandOvers(self._connect, 10, clock=self.clock)
        self.rested = threading.Semaphore(0)
        self.hand_overs.on_rest = self.rested.release

    def _connect(self, addresses: Sequence[str]) -> FakeSender:
        return self.senders.setdefault(addresses[0], FakeSender(addresses[0], self.gate))

    def start(self, address: str) -> Push:
        target = HandOver(transfers=(address,), token=b"t", num_cached_tokens=0, page_offsets=(0,), page_bytes=10)
        push = self.hand_overs.start("r", target)
        push.advance(1, (0,), 10)
        return push


def test_one_that_cannot_be_reached_keeps_nobody_from_the_others(pushes: Pushes) -> None:
    stuck = [pushes.start("cut off") for _ in range(8)]
    assert pushes.start("well") and pushes.rested.acquire(timeout=60)
    assert all(push.is_busy for push in stuck)


def test_who_did_not_answer_is_not_waited_for_again_at_once(pushes: Pushes) -> None:
    stuck = [pushes.start("cut off") for _ in range(8)]
    pushes.gate.set()
    assert all(pushes.rested.acquire(timeout=60) for _ in stuck)
    assert all(isinstance(push.error, UnreachableError) for push in stuck)
    num_writes = pushes.senders["cut off"].num_writes
    assert num_writes <= 2, "the others failed without a try"
    assert pushes.start("well") and pushes.rested.acquire(timeout=60)
    pushes.clock.now_s += 31
    pushes.start("cut off")
    assert pushes.rested.acquire(timeout=60)
    assert pushes.senders["cut off"].num_writes == num_writes + 1
