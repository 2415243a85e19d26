"""Engines that share the physical pages of one process, on runners that read every token back from the pages."""

import asyncio
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from torch import Tensor

from tests.runtime.fakes import EngineFactory, HistoryRunner
from xllm_compile.runtime.async_engine import AsyncEngine
from xllm_compile.runtime.engine_thread import EngineAsleepError
from xllm_compile.runtime.memory.cpu_memory import CpuMemory
from xllm_compile.runtime.memory.shared_pages import PageShare, SharedMemoryFullError, SharedPages
from xllm_compile.runtime.sampling_params import RequestOutputKind, SamplingParams
from xllm_compile.runtime.step import Step

# Three tokens of the fake model. One sequence of 60 tokens takes 20 pages.
PAGE_BYTES = 3 * 4096
NUM_PAGES = 100
MAX_MODEL_LEN = 60
WEIGHT_PAGES = 10


@dataclass(frozen=True)
class Model:
    engine: AsyncEngine
    runner: HistoryRunner
    share: PageShare

    async def generate(self, name: str, prompt: list[int], count: int) -> None:
        """Generate, and check that the tokens are those of a model alone."""
        params = SamplingParams(
            temperature=0, ignore_eos=True, max_tokens=count, output_kind=RequestOutputKind.FINAL_ONLY
        )
        stream = await self.engine.submit(name, prompt, params)
        outputs = [output async for output in stream]
        assert outputs[-1].outputs[0].token_ids == self.runner.greedy(prompt, count)

    @property
    def num_owned(self) -> int:
        return sum(self.engine.stats().kv_pages.values())

    @property
    def num_cached(self) -> int:
        return self.engine.stats().kv_pages["reusable"]


@pytest.fixture
def pages() -> SharedPages:
    return SharedPages(CpuMemory(NUM_PAGES, PAGE_BYTES))


@pytest.fixture
def models(make_engine: EngineFactory, pages: SharedPages) -> Iterator[list[Model]]:
    made = []
    for name in ("one", "two"):
        share = pages.share(name, num_weight_pages=WEIGHT_PAGES, min_kv_pages=MAX_MODEL_LEN // 3)
        engine, runner = make_engine(
            max_model_len=MAX_MODEL_LEN, total_tokens=3 * NUM_PAGES, block_tokens=4, share=share, num_slots=16
        )
        engine.take_memory()
        made.append(Model(AsyncEngine(engine), runner, share))
    yield made
    for model in made:
        model.runner.gate.set()
        model.engine.shutdown()
        model.engine.engine.close()


def prompt_of(number: int, length: int = 40) -> list[int]:
    return [10 + (number * 31 + at * 7) % 200 for at in range(length)]


def check_all_pages(pages: SharedPages, models: list[Model]) -> None:
    """Each page is somebody's, once."""
    awake = [model for model in models if model.share.is_awake]
    assert pages.num_free + sum(model.num_owned + WEIGHT_PAGES for model in awake) == NUM_PAGES


async def fill(model: Model, count: int = 8) -> None:
    for index in range(count):
        await model.generate(f"fill-{index}", prompt_of(index), 4)


async def test_what_is_free_is_for_whoever_asks_and_what_is_cached_gives_way_to_the_other(
    pages: SharedPages, models: list[Model]
) -> None:
    one, two = models
    assert (one.num_owned, two.num_owned, pages.num_free) == (20, 20, 40)
    await fill(one)
    # All but the pages of the other's one sequence.
    assert one.num_owned == 60 and one.num_cached > 50 and pages.num_free == 0
    await asyncio.gather(*(two.generate(str(index), prompt_of(index + 50), 15) for index in range(4)))
    assert two.num_owned > 30 and one.num_owned >= 20
    check_all_pages(pages, models)
    # What was taken is computed again, what was not is found.
    await fill(one)


async def test_both_are_busy_and_neither_starves(pages: SharedPages, models: list[Model]) -> None:
    rng = random.Random(1)
    jobs = []
    for index in range(60):
        model = models[index % 2 if index < 40 else 0]
        prompt = prompt_of(rng.randrange(6), rng.randrange(3, 40))
        jobs.append(model.generate(f"{index}", prompt, rng.randrange(1, MAX_MODEL_LEN - len(prompt))))
    await asyncio.gather(*jobs)
    check_all_pages(pages, models)
    assert all(model.engine.stats().kv_tokens_used == 0 for model in models)


async def test_a_sleeping_model_leaves_its_pages_to_the_other_and_wakes_with_what_it_needs(
    pages: SharedPages, models: list[Model]
) -> None:
    one, two = models
    await fill(one)
    await one.engine.sleep()
    assert not one.share.is_awake and one.num_owned == 0
    with pytest.raises(EngineAsleepError):
        await one.engine.submit("no", prompt_of(1), SamplingParams())
    await fill(two, 12)
    assert two.num_owned == 90 and pages.num_free == 0
    await asyncio.to_thread(one.engine.wake_up)
    # Twice changes nothing.
    await asyncio.to_thread(one.engine.wake_up)
    assert one.num_owned == 20
    check_all_pages(pages, models)
    await fill(one)
    await fill(two)


async def test_a_model_without_room_sleeps_on_and_says_who_has_it(
    pages: SharedPages, models: list[Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = models
    await one.engine.sleep(mode="abort")
    execute = two.runner.execute

    def stop_when_all_decode(step: Step, on_layers: Callable[[], None] | None = None) -> Tensor:
        logits = execute(step, on_layers)
        if len(step.slot) == 5:
            two.runner.gate.clear()
            monkeypatch.setattr(two.runner, "execute", execute)
        return logits

    monkeypatch.setattr(two.runner, "execute", stop_when_all_decode)
    # Five prompts of 15 pages, of 90: what is left is not enough.
    running = [asyncio.create_task(two.generate(str(index), prompt_of(index, 45), 6)) for index in range(5)]
    while two.runner.gate.is_set():
        await asyncio.sleep(0)
    waking = asyncio.create_task(asyncio.to_thread(one.engine.wake_up))
    while two.share.num_asked == 0:
        await asyncio.sleep(0)
    two.runner.gate.set()
    with pytest.raises(SharedMemoryFullError, match=r"model 'one' needs 0 MiB to wake up .*in use: 'two'"):
        await waking
    assert one.engine.is_sleeping and one.num_owned == 0
    await asyncio.gather(*running)
    await asyncio.to_thread(one.engine.wake_up)
    check_all_pages(pages, models)
    await fill(one)


async def test_paused_requests_keep_a_model_from_sleeping(models: list[Model]) -> None:
    one, _ = models
    one.runner.gate.clear()
    running = asyncio.create_task(one.generate("a", prompt_of(1), 9))
    while one.engine.stats().num_running == 0:
        await asyncio.sleep(0)
    pausing = asyncio.create_task(one.engine.pause())
    one.runner.gate.set()
    await pausing
    with pytest.raises(ValueError, match="1 requests are paused and hold KV"):
        await one.engine.sleep()
    assert not one.engine.is_sleeping
    await running


async def test_when_all_sleep_the_system_has_the_memory(pages: SharedPages, models: list[Model]) -> None:
    memory = pages.memory
    assert isinstance(memory, CpuMemory)
    for model in models:
        await fill(model)
    assert sum(memory._present) > 0
    for model in models:
        await model.engine.sleep()
    assert sum(memory._present) == 0 and pages.num_free == NUM_PAGES
