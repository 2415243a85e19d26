import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.runtime.fakes import EngineFactory, HistoryRunner
from tests.runtime.sides import room_for
from xllm_compile.runtime.async_engine import AsyncEngine
from xllm_compile.runtime.engine_config import EngineConfig
from xllm_compile.runtime.engine_thread import EngineAsleepError, EngineDeadError, EngineDrainingError
from xllm_compile.runtime.outputs import RequestOutput
from xllm_compile.runtime.policies.queue_bound import QueueFullError
from xllm_compile.runtime.resume import Resume
from xllm_compile.runtime.sampling_params import RequestOutputKind, SamplingParams
from xllm_compile.runtime.tokenizer import Tokenizer
from xllm_compile.runtime.transfer.transfer import TransferConfig

PROMPT = [40, 41, 42]
LONG = SamplingParams(temperature=0, ignore_eos=True, max_tokens=None, output_kind=RequestOutputKind.DELTA)
Start = Callable[..., tuple[AsyncEngine, HistoryRunner]]


@pytest.fixture
def start(make_engine: EngineFactory) -> Iterator[Start]:
    """Makes async engines, and ends their threads after the test."""
    started: list[tuple[AsyncEngine, HistoryRunner]] = []

    def make(**options) -> tuple[AsyncEngine, HistoryRunner]:
        engine, runner = make_engine(**options)
        started.append((AsyncEngine(engine), runner))
        return started[-1]

    yield make
    for engine, runner in started:
        runner.gate.set()
        engine.shutdown()


def greedy(count: int) -> SamplingParams:
    return SamplingParams(
        temperature=0, ignore_eos=True, max_tokens=count, output_kind=RequestOutputKind.DELTA, logprobs=None
    )


async def collect(engine: AsyncEngine, request_id: str, prompt: list[int], params: SamplingParams) -> list[int]:
    return [
        token
        async for output in engine.generate(request_id, prompt, params)
        for completion in output.outputs
        for token in completion.token_ids
    ]


async def test_a_claim_does_not_wait_for_the_device(tokenizer: Tokenizer) -> None:
    made, runner = EngineFactory(tokenizer, is_async=True)(transfer=TransferConfig(timeout_s=5))
    engine = AsyncEngine(made)
    await engine.reserve(room_for("r", PROMPT))
    running = asyncio.create_task(collect(engine, "running", [50, 51], greedy(3)))
    try:
        runner.gate.clear()
        while not engine.stats().num_running:
            await asyncio.sleep(0)
        async with asyncio.timeout(30):
            await engine.submit("taken over", PROMPT, greedy(3), resume=Resume(output_token_ids=[], reservation_id="r"))
        runner.gate.set()
        assert await running == runner.greedy([50, 51], 3)
    finally:
        runner.gate.set()
        engine.shutdown()


async def test_concurrent_requests_each_get_their_own_stream(start: Start) -> None:
    engine, runner = start(total_tokens=120)
    prompts = [[50 + index] * (1 + index) for index in range(12)]
    results = await asyncio.gather(
        *(collect(engine, str(index), prompt, greedy(10)) for index, prompt in enumerate(prompts))
    )
    assert results == [runner.greedy(prompt, 10) for prompt in prompts]
    assert engine.is_healthy and engine.stats().num_generated_tokens == 120


async def test_cumulative_outputs_end_with_everything(start: Start) -> None:
    engine, runner = start()
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=8)
    outputs = [output async for output in engine.generate("one", PROMPT, params)]
    assert outputs[-1].finished and outputs[-1].outputs[0].token_ids == runner.greedy(PROMPT, 8)
    counts = [len(output.outputs[0].token_ids) for output in outputs]
    assert counts == sorted(set(counts))


async def test_an_engine_and_a_consumer_that_stopped_hold_one_output(start: Start) -> None:
    engine, runner = start()
    stream = await engine.submit("one", PROMPT, greedy(50))
    while engine.stats().num_generated_tokens < 50:
        await asyncio.sleep(0.005)
    # The engine's thread posts what a step brought behind it.
    assert await engine.drain(timeout_s=60)
    await asyncio.sleep(0)
    (output,) = [output async for output in stream]
    assert output.finished and output.outputs[0].finish_reason == "length"
    assert output.outputs[0].token_ids == runner.greedy(PROMPT, 50)


async def test_long_text_is_tokenised_off_the_loop_and_shown(start: Start) -> None:
    engine, runner = start(max_model_len=8192, total_tokens=8192, max_num_batched_tokens=512)
    text = "the " * 2000
    (output,) = [
        output
        async for output in engine.generate(
            "one", text, SamplingParams(temperature=0, max_tokens=1, output_kind=RequestOutputKind.FINAL_ONLY)
        )
    ]
    assert output.prompt == text
    assert output.outputs[0].token_ids == runner.greedy(output.prompt_token_ids, 1)


async def test_bad_requests_raise_before_anything_runs(start: Start) -> None:
    engine, runner = start(config=EngineConfig(max_waiting=1))
    with pytest.raises(ValueError, match="0 tokens"):
        await engine.submit("one", [], greedy(1))
    runner.gate.clear()
    # One runs behind the gate or waits to, the others cannot all fit into a queue of one.
    streams = [await engine.submit("a", PROMPT, greedy(2))]
    with pytest.raises(ValueError, match="already in use"):
        await engine.submit("a", PROMPT, greedy(1))
    with pytest.raises(QueueFullError, match="max_waiting=1"):
        for index in range(3):
            streams.append(await engine.submit(f"b{index}", PROMPT, greedy(2)))
    runner.gate.set()
    for stream in streams:
        outputs = [output async for output in stream]
        assert outputs[-1].finished and sum(len(output.outputs[0].token_ids) for output in outputs) == 2
    # Its id is free again.
    assert await collect(engine, "a", PROMPT, greedy(1)) == runner.greedy(PROMPT, 1)


async def test_leaving_the_iteration_aborts_the_request(start: Start) -> None:
    engine, _ = start(max_model_len=4096, total_tokens=8192)
    stream = engine.generate("one", PROMPT, LONG)
    async for output in stream:
        assert not output.finished
        break
    await stream.aclose()
    assert await engine.drain(timeout_s=60)
    assert engine.stats().num_aborted == 1 and engine.stats().kv_tokens_used == 0


async def test_cancelling_the_consumer_aborts_the_request(start: Start) -> None:
    engine, runner = start()
    runner.gate.clear()
    task = asyncio.create_task(collect(engine, "one", PROMPT, LONG))
    other = asyncio.create_task(collect(engine, "two", PROMPT, greedy(5)))
    while engine.stats().num_running + engine.stats().num_waiting == 0:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    runner.gate.set()
    assert await other == runner.greedy(PROMPT, 5)
    assert await engine.drain(timeout_s=60)
    assert engine.stats().num_aborted == 1


async def test_closing_a_stream_that_was_never_read_aborts_it(start: Start) -> None:
    engine, _ = start(max_model_len=4096, total_tokens=4096)
    stream = await engine.submit("one", PROMPT, LONG)
    await stream.aclose()
    await stream.aclose()
    assert [output async for output in stream] == []
    assert await engine.drain(timeout_s=60)
    assert engine.stats().num_aborted == 1


async def test_abort_from_elsewhere_ends_the_stream_with_abort(start: Start) -> None:
    engine, runner = start()
    runner.gate.clear()
    stream = await engine.submit("one", PROMPT, LONG)
    await engine.abort("one")
    await engine.abort("unknown")
    runner.gate.set()
    outputs = [output async for output in stream]
    assert outputs[-1].finished and outputs[-1].outputs[0].finish_reason == "abort"


async def test_drain_lets_running_requests_finish_and_takes_no_new_ones(start: Start) -> None:
    engine, runner = start()
    runner.gate.clear()
    running = await engine.submit("one", PROMPT, greedy(9))
    drained = asyncio.create_task(engine.drain(timeout_s=60))
    while not engine.is_draining:
        await asyncio.sleep(0)
    with pytest.raises(EngineDrainingError, match="draining"):
        await engine.submit("two", PROMPT, greedy(1))
    runner.gate.set()
    assert await drained
    outputs = [output async for output in running]
    assert [token for output in outputs for token in output.outputs[0].token_ids] == runner.greedy(PROMPT, 9)
    assert engine.is_healthy


async def test_drain_aborts_what_is_left_at_its_bound(start: Start) -> None:
    engine, runner = start()
    runner.gate.clear()
    streams = [await engine.submit(str(index), PROMPT, LONG) for index in range(3)]
    drained = asyncio.create_task(engine.drain(timeout_s=0))
    while not drained.done() and len(engine._thread._inbox) < 3:
        await asyncio.sleep(0)
    runner.gate.set()
    assert not await drained
    for stream in streams:
        outputs = [output async for output in stream]
        assert outputs[-1].outputs[0].finish_reason == "abort"


async def test_an_idle_engine_drains_at_once(start: Start) -> None:
    engine, _ = start()
    assert await engine.drain(timeout_s=0)


async def test_an_error_in_the_engine_fails_every_request_and_health(start: Start) -> None:
    engine, runner = start()
    runner.gate.clear()
    streams = [await engine.submit(str(index), PROMPT, LONG) for index in range(3)]
    runner.fails = True
    runner.gate.set()
    for stream in streams:
        with pytest.raises(EngineDeadError, match="the device is gone"):
            async for output in stream:
                assert not output.finished
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
    assert not engine.is_healthy and isinstance(engine.error, RuntimeError)
    with pytest.raises(EngineDeadError) as raised:
        await engine.submit("late", PROMPT, LONG)
    assert raised.value.__cause__ is engine.error
    assert await engine.drain(timeout_s=60)


async def test_shutdown_fails_what_runs_and_ends_the_thread(start: Start) -> None:
    engine, _ = start(max_model_len=4096, total_tokens=4096)
    stream = await engine.submit("one", PROMPT, LONG)
    await asyncio.to_thread(engine.shutdown)
    with pytest.raises(EngineDeadError, match="shut down"):
        async for output in stream:
            assert not output.finished
    assert not engine.is_healthy
    assert not any(thread is engine._thread._thread for thread in threading.enumerate())
    with pytest.raises(EngineDeadError, match="shut down"):
        await engine.submit("late", PROMPT, LONG)


def test_several_event_loops_share_one_engine(start: Start) -> None:
    engine, runner = start()
    results: dict[int, list[int]] = {}

    def client(index: int) -> None:
        results[index] = asyncio.run(collect(engine, str(index), [50 + index], greedy(6)))

    threads = [threading.Thread(target=client, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {index: runner.greedy([50 + index], 6) for index in range(4)}


def test_a_closed_event_loop_does_not_hurt_the_others(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, runner = start(max_model_len=4096, total_tokens=8192)
    execute = runner.execute

    def execute_one(*args):
        monkeypatch.undo()
        result = execute(*args)
        runner.gate.clear()
        return result

    # The others wait: or all might be done before the loop is closed.
    monkeypatch.setattr(runner, "execute", execute_one)
    loop = asyncio.new_event_loop()
    stream = loop.run_until_complete(engine.submit("gone", PROMPT, LONG))
    first: RequestOutput = loop.run_until_complete(anext(stream))
    assert not first.finished
    loop.close()
    runner.gate.set()
    assert asyncio.run(collect(engine, "here", PROMPT, greedy(5))) == runner.greedy(PROMPT, 5)
    assert asyncio.run(engine.drain(timeout_s=60))
    assert engine.stats().num_aborted == 1


@pytest.mark.parametrize("num_tokens_before", [0, 1, 2, 5])
async def test_pause_and_resume_lose_and_repeat_nothing(start: Start, num_tokens_before: int) -> None:
    engine, runner = start()
    stream = await engine.submit("one", PROMPT, greedy(12))
    tokens: list[int] = []
    while len(tokens) < num_tokens_before:
        tokens += (await anext(stream)).outputs[0].token_ids
    await engine.pause()
    num_steps = len(runner.steps)
    # Taken, and not computed.
    other = asyncio.create_task(collect(engine, "two", PROMPT, greedy(3)))
    while engine.stats().num_waiting == 0:
        await asyncio.sleep(0)
    assert engine.is_paused and len(runner.steps) == num_steps
    engine.resume()
    tokens += [token async for output in stream for token in output.outputs[0].token_ids]
    assert tokens == runner.greedy(PROMPT, 12) and await other == runner.greedy(PROMPT, 3)
    assert not engine.is_paused


async def test_pause_by_waiting_lets_what_runs_finish_and_holds_the_rest(start: Start) -> None:
    engine, runner = start()
    runner.gate.clear()
    first = await engine.submit("one", PROMPT, greedy(9))
    while engine.stats().num_running == 0:
        await asyncio.sleep(0)
    pausing = asyncio.create_task(engine.pause("wait"))
    while not engine.is_paused:
        await asyncio.sleep(0)
    held, left = await engine.submit("two", PROMPT, greedy(4)), await engine.submit("three", PROMPT, greedy(4))
    await left.aclose()
    runner.gate.set()
    await pausing
    assert [token async for output in first for token in output.outputs[0].token_ids] == runner.greedy(PROMPT, 9)
    assert engine.stats().num_running == 0
    engine.resume()
    assert [token async for output in held for token in output.outputs[0].token_ids] == runner.greedy(PROMPT, 4)
    assert await engine.drain(timeout_s=60) and engine.stats().kv_tokens_used == 0


async def test_pause_by_aborting_ends_what_runs(start: Start) -> None:
    engine, runner = start(max_model_len=4096, total_tokens=8192)
    stream = await engine.submit("one", PROMPT, LONG)
    await anext(stream)
    await engine.pause("abort")
    outputs = [output async for output in stream]
    assert outputs[-1].outputs[0].finish_reason == "abort" and engine.stats().kv_tokens_used == 0
    engine.resume()
    assert await collect(engine, "two", PROMPT, greedy(3)) == runner.greedy(PROMPT, 3)


async def test_requests_are_aborted_while_the_engine_pauses(start: Start) -> None:
    engine, _ = start(max_model_len=4096, total_tokens=8192)
    stream = await engine.submit("one", PROMPT, LONG)
    await engine.pause()
    await engine.abort("one")
    assert [output async for output in stream][-1].outputs[0].finish_reason == "abort"
    assert await engine.drain(timeout_s=60) and not engine.is_paused


async def test_an_engine_that_dies_while_it_pauses_says_so(start: Start) -> None:
    engine, runner = start()
    runner.gate.clear()
    stream = await engine.submit("one", PROMPT, LONG)
    while engine.stats().num_running == 0:
        await asyncio.sleep(0)
    pausing = asyncio.create_task(engine.pause())
    runner.fails = True
    runner.gate.set()
    with pytest.raises(EngineDeadError, match="the device is gone"):
        await pausing
    with pytest.raises(EngineDeadError):
        async for _ in stream:
            pass


async def test_what_runs_ends_before_the_engine_sleeps_and_nothing_new_begins(start: Start) -> None:
    engine, runner = start(block_tokens=4)
    runner.gate.clear()
    first = await engine.submit("one", PROMPT, greedy(12))
    sleeping = asyncio.create_task(engine.sleep())
    while not engine.is_sleeping:
        await asyncio.sleep(0)
    with pytest.raises(EngineAsleepError):
        await engine.submit("two", PROMPT, greedy(1))
    runner.gate.set()
    await sleeping
    assert [token async for output in first for token in output.outputs[0].token_ids] == runner.greedy(PROMPT, 12)
    assert set(engine.stats().kv_pages.items()) >= {("reusable", 0), ("mapped", 0)}
    engine.wake_up()
    assert await collect(engine, "two", PROMPT, greedy(12)) == runner.greedy(PROMPT, 12)


async def test_an_engine_that_cannot_give_its_memory_back_stays_awake(make_engine: EngineFactory) -> None:
    inner, runner = make_engine()

    def refuse(from_cache: bool) -> None:
        raise ValueError("an artifact of 2 ranks does not sleep")

    engine = AsyncEngine(inner, refuse)
    with pytest.raises(ValueError, match="2 ranks"):
        await engine.sleep()
    assert not engine.is_sleeping and not engine.is_paused
    assert await collect(engine, "one", PROMPT, greedy(3)) == runner.greedy(PROMPT, 3)
    engine.shutdown()
