import asyncio
import string
import time
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from xllm_compile.runtime.pooling import PoolingParams
from xllm_compile.runtime.sampling_params import RequestOutputKind, SamplingParams, embedding_params
from xllm_compile.scheduler.cluster.attempts import FailoverConfig
from xllm_compile.scheduler.cluster.placer import Placer
from xllm_compile.scheduler.cluster.run import InstanceLostError
from xllm_compile.scheduler.cluster.state import Health
from xllm_compile.scheduler.errors import ApiError, queue_full
from xllm_compile.scheduler.proto import xllm_pb2


def params_of(**fields):
    given: dict[str, Any] = {
        "temperature": 0.0,
        "ignore_eos": True,
        "max_tokens": 4,
        "output_kind": RequestOutputKind.DELTA,
    }
    return SamplingParams(**given | fields)


async def generate(cluster, request_id="r", prompt=b"ab", **fields):
    async with aclosing(cluster.client.generate(request_id, list(prompt), params_of(**fields))) as outputs:
        return [output async for output in outputs]


def text_of(outputs, index=0):
    return "".join(choice.text for output in outputs for choice in output.outputs if choice.index == index)


def ids_of(outputs, index=0):
    return [
        token for output in outputs for choice in output.outputs if choice.index == index for token in choice.token_ids
    ]


def running(cluster, name):
    return cluster.instances[name].engine.stats().num_running


async def test_the_tokens_of_one_instance(make_cluster):
    cluster = await make_cluster(a={})
    outputs = await generate(cluster, logprobs=0)
    assert text_of(outputs) == "cdef"
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    last = outputs[-1]
    assert last.outputs[0].finish_reason == "length"
    assert last.outputs[0].cumulative_logprob == pytest.approx(
        sum(
            logprob[token].logprob
            for output in outputs
            for choice in output.outputs
            for token, logprob in zip(choice.token_ids, choice.logprobs, strict=True)
        )
    )
    metrics = last.metrics
    assert metrics.arrival_s <= metrics.scheduled_s <= metrics.first_token_s <= metrics.last_token_s
    assert metrics.graph_steps["exact"] > 0


@pytest.mark.parametrize("kind", [RequestOutputKind.FINAL_ONLY, RequestOutputKind.CUMULATIVE])
async def test_output_kinds(make_cluster, kind):
    cluster = await make_cluster(a={})
    outputs = await generate(cluster, n=2, output_kind=kind)
    assert outputs[-1].finished
    assert [choice.text for choice in outputs[-1].outputs] == ["cdef", "cdef"]
    if kind is RequestOutputKind.FINAL_ONLY:
        assert len(outputs) == 1


async def test_prompt_logprobs_come_once(make_cluster):
    cluster = await make_cluster(a={})
    outputs = await generate(cluster, n=2, prompt=b"abc", prompt_logprobs=1, output_kind=RequestOutputKind.FINAL_ONLY)
    found = outputs[-1].prompt_logprobs
    assert found[0] is None
    assert [list(entries) for entries in found[1:]] == [[ord("b")], [ord("c")]]


async def test_requests_spread_over_instances(make_cluster):
    cluster = await make_cluster(a={}, b={})
    for instance in cluster.instances.values():
        instance.runner.gate.clear()
    first = asyncio.create_task(generate(cluster, "1"))
    await cluster.until(lambda: sum(each.load.num_running for each in cluster.cluster.instances()) == 1)
    second = asyncio.create_task(generate(cluster, "2"))
    await cluster.until(lambda: [each.load.num_running for each in cluster.cluster.instances()] == [1, 1])
    for instance in cluster.instances.values():
        instance.runner.gate.set()
    assert [text_of(outputs) for outputs in await asyncio.gather(first, second)] == ["cdef", "cdef"]


async def test_an_embedding(make_cluster):
    cluster = await make_cluster(a={})
    params = embedding_params(PoolingParams(normalize=False))
    outputs = [output async for output in cluster.client.generate("r", [7, 8], params)]
    np.testing.assert_array_equal(outputs[0].embedding, [3.0, 4.0, 8.0])
    assert outputs[0].finished


async def test_an_instance_that_refuses_gives_way_to_another(make_cluster):
    cluster = await make_cluster(a={"max_waiting": 1}, b={})
    full = cluster.instances["a"]
    full.service.is_draining = True
    assert text_of(await generate(cluster)) == "cdef"


async def test_when_all_refuse_the_client_hears_when_to_come_back(make_cluster):
    cluster = await make_cluster(a={"max_waiting": 1})
    with pytest.raises(ApiError) as caught:
        await generate(cluster, n=8)
        await asyncio.gather(*(generate(cluster, str(index), n=8, max_tokens=100) for index in range(8)))
    assert caught.value.kind.status == 429
    assert (caught.value.retry_after_s or 0) >= 1


async def test_of_very_many_that_refuse_not_all_are_asked(make_cluster):
    cluster = await make_cluster(failover=FailoverConfig(max_refusals=2, wait_s=10), a={}, b={}, c={})
    for instance in cluster.instances.values():
        instance.service.is_draining = True
    # What they report comes later than what they answer.
    cluster.cluster._note_report = lambda link: None
    with pytest.raises(ApiError) as caught:
        await generate(cluster)
    assert caught.value.kind.status == 503 and cluster.cluster.stats.num_refused == 2


async def test_a_mistake_of_the_client_is_told_as_it_is(make_cluster):
    cluster = await make_cluster(a={}, b={})
    with pytest.raises(ApiError) as caught:
        await generate(cluster, max_tokens=1000)
    assert (caught.value.kind.status, caught.value.code) == (400, "context_length_exceeded")


async def test_without_instances_a_request_waits_then_fails(make_cluster):
    cluster = await make_cluster(failover=FailoverConfig(wait_s=0.01), a={})
    await cluster.cluster.update([])
    with pytest.raises(ApiError) as caught:
        await generate(cluster)
    assert (caught.value.kind.status, caught.value.code) == (503, "no_instance")
    assert not cluster.client.is_healthy


async def test_a_request_waits_for_the_first_instance(make_cluster):
    cluster = await make_cluster(a={})
    await cluster.cluster.update([])
    waiting = asyncio.create_task(generate(cluster))
    await asyncio.sleep(0)
    await cluster.register()
    assert text_of(await waiting) == "cdef"


async def test_abort_ends_a_running_request(make_cluster):
    cluster = await make_cluster(a={})
    cluster.instances["a"].runner.gate.clear()
    task = asyncio.create_task(generate(cluster, max_tokens=100))
    await cluster.until(lambda: running(cluster, "a") == 1)
    await cluster.client.abort("r")
    outputs = await task
    assert outputs[-1].finished and outputs[-1].outputs[0].finish_reason == "abort"
    cluster.instances["a"].runner.gate.set()
    assert await cluster.instances["a"].service.limiter.wait_idle(10)


async def test_a_client_that_leaves_frees_its_instance(make_cluster):
    cluster = await make_cluster(a={})
    cluster.instances["a"].runner.gate.clear()
    task = asyncio.create_task(generate(cluster, max_tokens=100))
    await cluster.until(lambda: running(cluster, "a") == 1)
    task.cancel()
    await asyncio.wait([task])
    cluster.instances["a"].runner.gate.set()
    assert await cluster.instances["a"].service.limiter.wait_idle(10)


async def test_an_instance_that_is_gone_before_its_first_token(make_cluster):
    cluster = await make_cluster(a={}, b={})
    for instance in cluster.instances.values():
        instance.runner.gate.clear()
    task = asyncio.create_task(generate(cluster))
    await cluster.until(lambda: running(cluster, "a") + running(cluster, "b") == 1)
    gone, other = ("a", "b") if running(cluster, "a") else ("b", "a")
    cluster.instances[other].runner.gate.set()
    await cluster.instances[gone].stop()
    assert text_of(await task) == "cdef"


async def test_a_silent_instance_is_no_place(make_cluster, monkeypatch):
    monkeypatch.setattr("xllm_compile.scheduler.cluster.instance_link.SILENCE_S", 1.0)
    cluster = await make_cluster(a={}, b={})
    cluster.instances["a"].servicer.is_silent = True
    await cluster.until(lambda: next(each.health for each in cluster.cluster.instances()) is Health.SUSPECT)
    assert [text_of(await generate(cluster, str(index))) for index in range(3)] == ["cdef"] * 3
    assert cluster.instances["a"].runner.num_steps == 0
    cluster.instances["a"].servicer.is_silent = False
    await cluster.until(lambda: all(each.takes_work for each in cluster.cluster.instances()))


async def test_a_gateway_that_stood_still_blames_no_instance(make_cluster, monkeypatch):
    monkeypatch.setattr("xllm_compile.scheduler.cluster.instance_link.SILENCE_S", 1.0)
    cluster = await make_cluster(a={}, b={})
    downs = []
    for link in (cluster.cluster.link("a"), cluster.cluster.link("b")):
        monkeypatch.setattr(link, "_on_report", lambda link: downs.append(link) if not link.is_up else None)
        reported_s = link.reported_s
        await cluster.until(lambda link=link, reported_s=reported_s: link.reported_s > reported_s)
    # Nothing runs on the loop meanwhile.
    time.sleep(1.5)
    assert [text_of(await generate(cluster, str(index))) for index in range(3)] == ["cdef"] * 3
    assert not downs and cluster.cluster.stats.num_lost == 0


async def test_a_call_to_an_instance_that_left_finds_it_lost(make_cluster):
    cluster = await make_cluster(a={}, b={})
    link = cluster.cluster.link("a")
    await cluster.register("b")
    with pytest.raises(InstanceLostError, match="a: it left"):
        await link.reserve(xllm_pb2.ReserveRequest(reservation_id="r"))
    with pytest.raises(InstanceLostError, match="a: it left"), link.run(xllm_pb2.GenerateRequest(request_id="r")):
        pass


async def test_a_stream_that_lost_its_instance_waits_for_room_elsewhere(make_cluster, monkeypatch):
    """Its client has some of the answer: it is not sent away as one that comes then would be."""
    cluster = await make_cluster(a={}, b={})
    request = Interrupted(cluster, max_tokens=24)
    taken, other = await request.begun()

    def refuse(*_call):
        raise queue_full("all places are taken", 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(cluster.instances[other].service, "admit", refuse)
        await cluster.instances[taken].stop()
        await cluster.until(lambda: cluster.cluster.stats.num_refused >= 1)
        with pytest.raises(ApiError, match="all places are taken"):
            await generate(cluster, "new")
    cluster.instances[other].runner.gate.set()
    assert text_of(await request.task) == string.ascii_lowercase[2:]


async def test_a_request_that_was_lost_without_a_token_says_so_elsewhere(make_cluster, monkeypatch):
    cluster = await make_cluster(a={}, b={})
    resumes: dict[str, Any] = {}
    for name, instance in cluster.instances.items():
        instance.runner.gate.clear()

        def generated(*args, name=name, generate=instance.service.generate, **options):
            resumes[name] = options["resume"]
            return generate(*args, **options)

        monkeypatch.setattr(instance.service, "generate", generated)
    task = asyncio.create_task(generate(cluster))
    await cluster.until(lambda: any(running(cluster, name) for name in cluster.instances))
    ((gone, resume),) = resumes.items()
    assert resume is None
    await cluster.instances[gone].stop()
    await cluster.until(lambda: len(resumes) == 2)
    (other,) = set(resumes) - {gone}
    assert resumes[other].is_begun and not resumes[other].output_token_ids
    cluster.instances[other].runner.gate.set()
    assert text_of(await task) == "cdef"


@pytest.mark.parametrize(("is_known", "wait_s"), [(True, 30), (False, 0.5)])
async def test_a_request_that_ends_its_instances_is_given_up(make_cluster, is_known, wait_s):
    """is_known: the registry notices that they are gone; else they only stay silent."""
    cluster = await make_cluster(failover=FailoverConfig(max_losses=2, wait_s=wait_s), a={}, b={}, c={})
    for instance in cluster.instances.values():
        instance.runner.gate.clear()
    task = asyncio.create_task(generate(cluster))
    left = set(cluster.instances)
    for _ in range(2):
        await cluster.until(lambda: any(running(cluster, name) for name in left))
        name = next(name for name in left if running(cluster, name))
        left.remove(name)
        await cluster.instances[name].stop()
        if is_known:
            await cluster.register(*left)
    with pytest.raises(ApiError) as caught:
        await task
    assert caught.value.code == "instances_lost"


async def test_a_gateway_that_loses_all_at_once_blames_no_request(make_cluster):
    cluster = await make_cluster(failover=FailoverConfig(max_losses=2, wait_s=10), a={}, b={}, c={})
    for instance in cluster.instances.values():
        instance.runner.gate.clear()
    task = asyncio.create_task(generate(cluster))
    links = [cluster.cluster.link(name) for name in cluster.instances]
    for num_lost in (1, 2):
        await cluster.until(lambda: any(link.num_open for link in links))
        next(link for link in links if link.num_open)._lose("the network is cut")
        await cluster.until(lambda num_lost=num_lost: cluster.cluster.stats.num_lost == num_lost)
    for instance in cluster.instances.values():
        instance.runner.gate.set()
    assert text_of(await task) == "cdef"


async def test_an_instance_that_is_back_is_not_held_against_a_request(make_cluster):
    cluster = await make_cluster(failover=FailoverConfig(max_losses=2, wait_s=10), a={}, b={})
    for instance in cluster.instances.values():
        instance.runner.gate.clear()
    task = asyncio.create_task(generate(cluster))
    links = [cluster.cluster.link(name) for name in cluster.instances]
    for num_lost in range(1, 5):
        await cluster.until(lambda: any(link.num_open for link in links))
        link = next(link for link in links if link.num_open)
        link._lose("it was cut off")
        await cluster.until(lambda link=link: link.is_up and not link.num_open)
        assert cluster.cluster.stats.num_lost == num_lost
    for instance in cluster.instances.values():
        instance.runner.gate.set()
    assert text_of(await task) == "cdef"


@pytest.mark.parametrize("is_draining", [True, False])
async def test_only_an_instance_that_drains_may_end_a_request_early(make_cluster, is_draining):
    cluster = await make_cluster(failover=FailoverConfig(max_losses=1, wait_s=10), a={}, b={})
    for instance in cluster.instances.values():
        instance.runner.gate.clear()
    task = asyncio.create_task(generate(cluster, max_tokens=60))
    await cluster.until(lambda: any(running(cluster, name) for name in cluster.instances))
    name = next(name for name in cluster.instances if running(cluster, name))
    cluster.instances[name].service.is_draining = is_draining
    await cluster.until(lambda: cluster.cluster.link(name).load.is_draining == is_draining)
    cut = asyncio.create_task(cluster.instances[name].engine.drain(0.0))
    # The engine's thread, which stands still, is told before it goes on.
    await asyncio.sleep(0.05)
    for instance in cluster.instances.values():
        instance.runner.gate.set()
    await cut
    if is_draining:
        assert len(ids_of(await task)) == 60
    else:
        with pytest.raises(ApiError, match="lost 1 instances") as caught:
            await task
        assert caught.value.code == "instances_lost"


class Interrupted:
    """A request whose instance has brought some tokens and stands still."""

    def __init__(self, cluster, **fields):
        self.cluster = cluster
        for instance in cluster.instances.values():
            instance.runner.closes_after = instance.runner.num_steps + 4
        self.outputs: list[Any] = []
        self.task = asyncio.create_task(self._generate(fields))

    async def _generate(self, fields):
        async with aclosing(self.cluster.client.generate("r", list(b"ab"), params_of(**fields))) as outputs:
            async for output in outputs:
                self.outputs.append(output)
        return self.outputs

    async def begun(self):
        """The name of the instance, and of another."""
        while len(ids_of(self.outputs)) < 3:
            await asyncio.sleep(0.005)
        for instance in self.cluster.instances.values():
            instance.runner.closes_after = -1
            instance.runner.gate.clear()
        names = sorted(self.cluster.instances, key=lambda name: not running(self.cluster, name))
        return names[0], names[1]


@pytest.mark.parametrize(
    "fields", [{}, {"n": 2}, {"temperature": 1.0, "seed": 3}, {"stop": ("mno",), "max_tokens": 60}]
)
async def test_a_stream_goes_on_elsewhere_with_the_same_tokens(make_cluster, fields):
    fields = {"max_tokens": 40, "logprobs": 0} | fields
    cluster = await make_cluster(a={}, b={})
    expected = await generate(cluster, **fields)
    request = Interrupted(cluster, **fields)
    gone, other = await request.begun()
    await cluster.instances[gone].stop()
    cluster.instances[other].runner.gate.set()
    outputs = await request.task
    for index in range(fields.get("n", 1)):
        assert text_of(outputs, index) == text_of(expected, index)
        assert ids_of(outputs, index) == ids_of(expected, index)
    assert outputs[-1].finished
    assert outputs[-1].outputs[0].stop_reason == expected[-1].outputs[0].stop_reason


async def test_an_instance_that_cuts_requests_to_end_in_time_loses_none(make_cluster):
    cluster = await make_cluster(a={}, b={})
    expected = await generate(cluster, max_tokens=40)
    request = Interrupted(cluster, max_tokens=40)
    draining, other = await request.begun()
    instance = cluster.instances[draining]
    instance.service.is_draining = True
    cut = asyncio.create_task(instance.engine.drain(0.0))
    for each in cluster.instances.values():
        each.runner.gate.set()
    await cut
    outputs = await request.task
    assert text_of(outputs) == text_of(expected)
    assert outputs[-1].outputs[0].finish_reason == "length"
    assert cluster.instances[other].runner.num_steps > 0


async def test_abort_reaches_a_request_that_waits_for_an_instance(make_cluster):
    cluster = await make_cluster(a={})
    await cluster.cluster.update([])
    task = asyncio.create_task(generate(cluster))
    while not cluster.client.num_open:
        await asyncio.sleep(0.005)
    await cluster.client.abort("r")
    outputs = await asyncio.wait_for(task, 5)
    assert outputs[-1].outputs[0].finish_reason == "abort"


@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.05, 0.1])
async def test_none_of_many_requests_is_forgotten_when_an_instance_goes(make_cluster, after_s):
    cluster = await make_cluster(a={}, b={})
    tasks = [asyncio.create_task(generate(cluster, str(index), max_tokens=20)) for index in range(100)]
    await asyncio.sleep(after_s)
    await cluster.instances["a"].stop()
    async with asyncio.timeout(30):
        texts = [text_of(outputs) for outputs in await asyncio.gather(*tasks)]
    assert texts == ["cdefghijklmnopqrstuv"] * 100


async def test_what_was_learnt_of_an_instance_goes_with_it(make_cluster):
    cluster = await make_cluster(a={}, b={})
    gone: list[Any] = []
    cluster.cluster.on_gone = gone.append
    info = cluster.instances["a"].info
    await cluster.register("b")
    assert gone == [info]
    # One that was never chosen is forgotten as well.
    Placer().gone(info)
    assert text_of(await generate(cluster)) == "cdef"


async def test_the_placer_hears_of_a_first_token_once(make_cluster):
    cluster = await make_cluster(a={})
    placer = cluster.client._placer
    heard = []
    tell = placer.first_token

    def noted(key):
        heard.append(key)
        tell(key)

    placer.first_token = noted
    await generate(cluster, max_tokens=10)
    assert len(heard) == 1
