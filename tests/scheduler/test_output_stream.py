import asyncio

import pytest

from xllm_compile.runtime.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from xllm_compile.scheduler.errors import ApiError, queue_full
from xllm_compile.scheduler.output_stream import OutputStream

LOGPROB = Logprob(logprob=-1.0, rank=1, decoded_token="x")


def output(*choices, finished=False, cached=0):
    return RequestOutput(
        request_id="r",
        prompt=None,
        prompt_token_ids=[1],
        outputs=list(choices),
        finished=finished,
        metrics=RequestMetrics(arrival_s=0.0),
        num_cached_tokens=cached,
    )


def choice(index, text, token_ids, finish_reason=None):
    logprobs = [{token_id: LOGPROB} for token_id in token_ids]
    return CompletionOutput(index=index, text=text, token_ids=token_ids, logprobs=logprobs, finish_reason=finish_reason)


async def play(*items, closed=None):
    """Yields outputs, raises errors, waits on events."""
    try:
        for item in items:
            if isinstance(item, asyncio.Event):
                await item.wait()
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        if closed is not None:
            closed.set()


async def settle():
    """Let every task that can go on do so."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_what_nobody_read_is_joined():
    more = asyncio.Event()
    first_prompt = play(output(choice(0, "a", [1])), output(choice(0, "b", [2], "stop"), finished=True, cached=1))
    second_prompt = play(
        output(choice(0, "x", [9])), more, output(choice(0, "y", [8], "length"), finished=True, cached=2)
    )
    async with OutputStream([first_prompt, second_prompt], 1) as stream:
        await settle()
        first, second = await anext(stream)
        assert (first.index, first.text, first.token_ids, first.finish_reason) == (0, "ab", [1, 2], "stop")
        assert first.logprobs == [{1: LOGPROB}, {2: LOGPROB}]
        assert (second.text, second.finish_reason) == ("x", None)
        more.set()
        (last,) = await anext(stream)
        assert (last.index, last.text) == (1, "y")
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert (stream.num_completion_tokens, stream.num_cached_tokens) == (4, 3)


async def test_an_endless_engine_and_a_reader_that_stopped_hold_one_choice():
    """Of each prompt. A single one waits where its outputs come from, which joins them: RequestStream and Run."""
    prompts = [play(*(output(choice(0, "a", [1])) for _ in range(1000))) for _ in range(2)]
    async with OutputStream(prompts, 1) as stream:
        await settle()
        while stream._num_running:
            await asyncio.sleep(0)
        assert len(stream._pending) == 2
        assert [held.text for held in await anext(stream)] == ["a" * 1000] * 2


async def test_a_single_prompt_is_read_as_its_reader_goes():
    taken = []

    async def engine():
        for index in range(3):
            taken.append(index)
            yield output(choice(0, "a", [1]), finished=index == 2)

    async with OutputStream([engine()], 1) as stream:
        await settle()
        assert not taken
        assert [held.text for held in await anext(stream)] == ["a"]
        assert taken == [0]
        assert [held.text for held in await stream.collect()] == ["aa"]


async def test_choices_of_several_prompts_are_numbered_on():
    prompts = [play(output(choice(at, str(p), [p], "stop"), finished=True)) for p, at in ((0, 0), (1, 1), (2, 0))]
    async with OutputStream(prompts, 2) as stream:
        assert [(item.index, item.text) for item in await stream.collect()] == [(0, "0"), (3, "1"), (4, "2")]


async def test_one_failure_is_raised_and_the_others_are_closed():
    closed = asyncio.Event()
    waiting = play(output(choice(0, "a", [1])), asyncio.Event(), closed=closed)
    with pytest.raises(ApiError, match="full"):
        async with OutputStream([waiting, play(queue_full("full", 1.0))], 1) as stream:
            await stream.collect()
    assert closed.is_set()


async def test_what_came_before_a_failure_is_read_first():
    async with OutputStream([play(output(choice(0, "a", [1])), queue_full("full", 1.0))], 1) as stream:
        await settle()
        assert (await anext(stream))[0].text == "a"
        with pytest.raises(ApiError):
            await anext(stream)


async def test_leaving_early_closes_the_engines_iterator():
    closed = asyncio.Event()
    async with OutputStream([play(output(choice(0, "a", [1])), asyncio.Event(), closed=closed)], 1) as stream:
        await anext(stream)
    assert closed.is_set()


async def test_an_abort_is_an_error_unless_the_api_has_a_word_for_it():
    aborted = output(choice(0, "a", [1], "abort"), finished=True)
    async with OutputStream([play(aborted)], 1) as stream:
        with pytest.raises(ApiError, match="ended this request early"):
            await anext(stream)
    async with OutputStream([play(aborted)], 1, abort_is_error=False) as stream:
        assert (await anext(stream))[0].finish_reason == "abort"
