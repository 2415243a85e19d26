import asyncio
from typing import Any

import grpc.aio
import pytest

from tests.scheduler.service_fixtures import MAX_MODEL_LEN
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.scheduler.cluster.generate_messages import generate_message
from xllm_compile.scheduler.proto import xllm_pb2


def start(name, prompt, **params):
    given = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 4} | params
    return xllm_pb2.RunRequest(start=generate_message(name, list(prompt), SamplingParams(**given), None))


async def read_until_ended(stream, names):
    """Token ids by request, and failures by request."""
    tokens: dict[str, list[int]] = {name: [] for name in names}
    failures = {}
    left = set(names)
    while left:
        message = await stream.read()
        assert message is not grpc.aio.EOF
        for output in message.outputs:
            tokens[output.request_id] += output.choices[0].token_ids
            if output.HasField("usage"):
                left.discard(output.request_id)
        for failure in message.failures:
            failures[failure.request_id] = failure
            left.discard(failure.request_id)
    return tokens, failures


async def test_many_requests_share_a_stream(stub):
    stream = stub.Run()
    for name, prompt in (("a", b"ab"), ("b", b"x")):
        await stream.write(start(name, prompt))
    tokens, failures = await read_until_ended(stream, ["a", "b"])
    assert {name: bytes(ids) for name, ids in tokens.items()} == {"a": b"cdef", "b": b"yz{|"}
    assert not failures


async def test_a_resumed_request_goes_on(stub):
    stream = stub.Run()
    request = start("a", b"ab")
    request.start.resume.CopyFrom(xllm_pb2.Resume(output_token_ids=list(b"cd"), num_text_chars=2))
    await stream.write(request)
    outputs: list[Any] = []
    while not outputs or not outputs[-1].HasField("usage"):
        outputs += (await stream.read()).outputs
    assert "".join(output.choices[0].text for output in outputs) == "ef"
    assert outputs[-1].usage.completion_tokens == 4


async def test_a_bad_request_fails_alone(stub):
    stream = stub.Run()
    await stream.write(start("long", b"a", max_tokens=MAX_MODEL_LEN + 1))
    await stream.write(start("good", b"a"))
    tokens, failures = await read_until_ended(stream, ["long", "good"])
    assert bytes(tokens["good"]) == b"bcde"
    assert failures["long"].status == 400
    assert failures["long"].code == "context_length_exceeded"


async def test_an_open_id_is_refused_and_the_open_request_goes_on(stub, runner):
    runner.gate.clear()
    stream = stub.Run()
    await stream.write(start("a", b"a"))
    await stream.write(start("a", b"x"))
    message = await stream.read()
    assert message.failures[0].status == 409
    runner.gate.set()
    tokens, failures = await read_until_ended(stream, ["a"])
    assert bytes(tokens["a"]) == b"bcde"
    assert not failures


async def test_a_cancelled_request_leaves_the_engine(stub, service, runner):
    runner.gate.clear()
    stream = stub.Run()
    await stream.write(start("a", b"a", max_tokens=100))
    while service.limiter.num_open < 1:
        await asyncio.sleep(0.005)
    await stream.write(xllm_pb2.RunRequest(cancel="a"))
    assert await service.limiter.wait_idle(10)
    runner.gate.set()
    # Its id stays taken until the engine has noticed.
    await stream.write(start("b", b"k", max_tokens=2))
    tokens, _ = await read_until_ended(stream, ["b"])
    assert bytes(tokens["b"]) == b"lm"


@pytest.mark.parametrize("how", ["cancel", "done_writing"])
async def test_the_end_of_the_stream_cancels_its_requests(stub, service, runner, how):
    runner.gate.clear()
    stream = stub.Run()
    for name in "abc":
        await stream.write(start(name, b"a", max_tokens=100))
    while service.limiter.num_open < 3:
        await asyncio.sleep(0.005)
    if how == "cancel":
        stream.cancel()
    else:
        await stream.done_writing()
    runner.gate.set()
    assert await service.limiter.wait_idle(10)
