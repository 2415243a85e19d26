import asyncio
from typing import cast

import pytest

from xllm_compile.runtime.memory.shared_pages import SharedMemoryFullError
from xllm_compile.scheduler.engine_client import EngineClient
from xllm_compile.scheduler.model_waker import ModelWaker


class Memory:
    """Room for so many models."""

    def __init__(self, size: int) -> None:
        self.left = size
        self.log: list[str] = []


class Engine:
    """As far as it sleeps and wakes up."""

    def __init__(self, name: str, memory: Memory) -> None:
        self.name, self.memory, self.is_sleeping, self.num_running = name, memory, True, 0

    def wake_up(self) -> None:
        if self.memory.left == 0:
            raise SharedMemoryFullError(f"no room for {self.name}")
        self.memory.left -= 1
        self.is_sleeping = False
        self.memory.log.append(f"+{self.name}")

    async def sleep(self, level: int, mode: str) -> None:
        assert (level, mode) == (1, "wait") and self.num_running == 0
        self.memory.left += 1
        self.is_sleeping = True
        self.memory.log.append(f"-{self.name}")


def waker_with(size: int) -> tuple[ModelWaker, dict[str, Engine], Memory]:
    memory = Memory(size)
    engines = {name: Engine(name, memory) for name in "abc"}
    return ModelWaker(cast("dict[str, EngineClient]", engines)), engines, memory


async def use(waker: ModelWaker, engine: Engine, gate: asyncio.Event | None = None) -> None:
    async with waker.awake(engine.name):
        assert not engine.is_sleeping
        engine.num_running += 1
        if gate is not None:
            await gate.wait()
        # Whatever happened meanwhile.
        assert not engine.is_sleeping
        engine.num_running -= 1


async def test_the_model_used_longest_ago_makes_room() -> None:
    waker, engines, memory = waker_with(2)
    for name in "abacb":
        await use(waker, engines[name])
    assert memory.log == ["+a", "+b", "-b", "+c", "-a", "+b"]


async def test_an_idle_model_makes_room_before_a_busy_one() -> None:
    waker, engines, memory = waker_with(2)
    gate = asyncio.Event()
    busy = asyncio.create_task(use(waker, engines["a"], gate))
    await asyncio.sleep(0)
    while engines["a"].num_running == 0:
        await asyncio.sleep(0)
    await use(waker, engines["b"])
    await use(waker, engines["c"])
    assert memory.log == ["+a", "+b", "-b", "+c"]
    gate.set()
    await busy


async def test_a_busy_model_finishes_first_and_what_comes_for_it_waits_its_turn() -> None:
    waker, engines, memory = waker_with(1)
    gate = asyncio.Event()
    first = asyncio.create_task(use(waker, engines["a"], gate))
    while engines["a"].num_running == 0:
        await asyncio.sleep(0)
    other = asyncio.create_task(use(waker, engines["b"]))
    while not waker._models["a"].is_leaving:
        await asyncio.sleep(0)
    late = asyncio.create_task(use(waker, engines["a"]))
    await asyncio.sleep(0)
    assert engines["a"].num_running == 1 and not (other.done() or late.done())
    gate.set()
    await asyncio.gather(first, other, late)
    assert memory.log == ["+a", "-a", "+b", "-b", "+a"]


async def test_a_client_that_gives_up_leaves_the_model_it_waited_for_awake() -> None:
    waker, engines, memory = waker_with(1)
    gate = asyncio.Event()
    first = asyncio.create_task(use(waker, engines["a"], gate))
    while engines["a"].num_running == 0:
        await asyncio.sleep(0)
    other = asyncio.create_task(use(waker, engines["b"]))
    while not waker._models["a"].is_leaving:
        await asyncio.sleep(0)
    other.cancel()
    with pytest.raises(asyncio.CancelledError):
        await other
    gate.set()
    await first
    await use(waker, engines["a"])
    assert memory.log == ["+a"]


async def test_a_model_that_never_fits_is_refused() -> None:
    waker, engines, _ = waker_with(0)
    with pytest.raises(SharedMemoryFullError, match="no room for a"):
        await use(waker, engines["a"])


async def test_many_requests_for_many_models_are_all_served() -> None:
    waker, engines, memory = waker_with(2)
    await asyncio.gather(*(use(waker, engines["abc"[index % 3]]) for index in range(60)))
    assert memory.left >= 0 and all(engine.num_running == 0 for engine in engines.values())
