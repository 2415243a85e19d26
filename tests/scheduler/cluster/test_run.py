import asyncio

import pytest

from xllm_compile.runtime.outputs import CompletionOutput
from xllm_compile.scheduler.cluster.run import InstanceLostError, Run
from xllm_compile.scheduler.errors import ApiError, queue_full
from xllm_compile.scheduler.proto import xllm_pb2


def response(text="a", tokens=(1,), **fields):
    choice = xllm_pb2.Choice(text=text, token_ids=tokens)
    return xllm_pb2.GenerateResponse(request_id="r", choices=[choice], **fields)


async def test_an_endless_engine_and_a_reader_that_stopped_hold_one_output():
    run = Run()
    for _ in range(1000):
        run.put(response())
    assert len(run._items) == 1
    new = await run.next()
    assert isinstance(new, CompletionOutput) and not run.is_over
    assert (new.text, new.token_ids) == ("a" * 1000, [1] * 1000)


async def test_what_is_more_than_tokens_comes_by_itself_and_in_its_place():
    run = Run()
    first = response("p", prompt_logprobs=[xllm_pb2.TokenLogprobs()])
    last = response("z", usage=xllm_pb2.Usage(completion_tokens=4))
    for each in (first, response("b"), response("c"), last):
        run.put(each)
    assert await run.next() == first
    assert (await run.next()).text == "bc"
    assert not run.is_over
    assert await run.next() == last
    assert run.is_over


async def test_an_aborted_run_ends_behind_what_came_before():
    run = Run()
    run.put(response("b"))
    run.abort("r")
    assert (await run.next()).text == "b"
    assert (await run.next()).choices[0].finish_reason == xllm_pb2.FINISH_REASON_ABORT
    assert run.is_over


@pytest.mark.parametrize(("error", "is_over"), [(queue_full("full", 1.0), True), (InstanceLostError("gone"), False)])
async def test_what_came_before_a_failure_is_read_first(error, is_over):
    run = Run()
    reading = asyncio.create_task(run.next())
    await asyncio.sleep(0)
    run.put(response("b"))
    run.fail(error)
    assert (await reading).text == "b"
    with pytest.raises((ApiError, InstanceLostError)):
        await run.next()
    assert run.is_over is is_over
