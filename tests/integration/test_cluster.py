"""A gateway and its instances as processes."""

import signal

import httpx
import openai
import pytest

from tests.integration.cluster_processes import NUM_TOKENS, Stream, answers_alone, busiest, clusters, complete
from tests.integration.helpers import until
from tests.integration.serve_process import ServeProcess, run_refused

pytestmark = pytest.mark.integration

PROMPTS = [f"def function_{index}(a, b):\n" for index in range(6)]


@pytest.fixture(scope="module")
def artifact(family_artifact):
    return family_artifact("qwen3")


@pytest.fixture(scope="module")
def expected(artifact):
    return answers_alone(artifact, PROMPTS)


@pytest.fixture
def start_cluster(artifact):
    with clusters(artifact) as start:
        yield start


def test_a_cluster_answers_as_one_server(start_cluster, expected):
    cluster = start_cluster("mix", "mix")
    streams = {prompt: Stream(cluster.gateway, prompt) for prompt in PROMPTS}
    assert {prompt: stream.result() for prompt, stream in streams.items()} == expected
    assert all(instance.metrics()["xllm_engine_steps_total"] > 0 for instance in cluster.instances.values())
    with openai.OpenAI(base_url=f"{cluster.gateway.http}/v1", api_key="unused", max_retries=0) as client:
        model = client.models.list().data[0].id
        answer = client.completions.create(model=model, prompt=PROMPTS[0], max_tokens=4, temperature=0, n=2, logprobs=2)
        assert [choice.text for choice in answer.choices] == [expected[PROMPTS[0]][: len(answer.choices[0].text)]] * 2
        assert len(client.embeddings.create(model=model, input="text").data[0].embedding) > 0


def test_prefill_and_decode_on_two_instances(start_cluster, expected):
    cluster = start_cluster("prefill", "decode")
    streams = {prompt: Stream(cluster.gateway, prompt) for prompt in PROMPTS}
    assert {prompt: stream.result() for prompt, stream in streams.items()} == expected
    assert cluster.counts()["num_handed_over"] == len(PROMPTS)
    prefill, decode = cluster.instances["prefill-0"].metrics(), cluster.instances["decode-1"].metrics()
    assert prefill["xllm_generation_tokens_total"] == len(PROMPTS)
    assert decode["xllm_generation_tokens_total"] == len(PROMPTS) * (NUM_TOKENS - 1)


@pytest.mark.parametrize("roles", [("mix", "mix"), ("prefill", "decode", "decode"), ("prefill", "prefill", "decode")])
def test_an_instance_that_is_killed_costs_no_token(start_cluster, expected, roles):
    cluster = start_cluster(*roles)
    streams = {prompt: Stream(cluster.gateway, prompt) for prompt in PROMPTS}
    cluster.instances[busiest(cluster)].send(signal.SIGKILL)
    assert {prompt: stream.result() for prompt, stream in streams.items()} == expected


def test_an_instance_that_stands_still_costs_no_token(start_cluster, expected):
    cluster = start_cluster("mix", "mix")
    streams = {prompt: Stream(cluster.gateway, prompt) for prompt in PROMPTS}
    name = busiest(cluster)
    cluster.instances[name].send(signal.SIGSTOP)
    assert {prompt: stream.result() for prompt, stream in streams.items()} == expected
    cluster.instances[name].send(signal.SIGCONT)
    until(lambda: all(each["health"] == "active" for each in cluster.members()))
    until(lambda: all(each["load"]["num_running"] == 0 for each in cluster.members()))
    assert complete(cluster.gateway, PROMPTS[0], max_tokens=NUM_TOKENS) == [expected[PROMPTS[0]]]


def test_an_instance_that_is_told_to_end_loses_no_request(start_cluster, expected):
    cluster = start_cluster("mix", "mix", options=("--drain-timeout", "0"))
    streams = {prompt: Stream(cluster.gateway, prompt) for prompt in PROMPTS}
    name = busiest(cluster)
    cluster.instances[name].send(signal.SIGTERM)
    assert {prompt: stream.result() for prompt, stream in streams.items()} == expected
    cluster.instances[name].wait()
    left = [other for other in cluster.instances if other != name]
    until(lambda: [each["name"] for each in cluster.members()] == left)


def test_the_last_instance_gone_and_another_come(start_cluster, expected):
    cluster = start_cluster("mix")
    stream = Stream(cluster.gateway, PROMPTS[0])
    cluster.instances[busiest(cluster)].send(signal.SIGKILL)
    cluster.add("later", "mix")
    assert stream.result() == expected[PROMPTS[0]]


def test_a_client_that_leaves_frees_the_instance(start_cluster):
    cluster = start_cluster("mix")
    with httpx.stream(
        "POST",
        f"{cluster.gateway.http}/v1/completions",
        json={"prompt": PROMPTS[0], "max_tokens": 450, "n": 8, "ignore_eos": True, "stream": True},
    ) as answer:
        next(answer.iter_lines())
    instance = cluster.instances["mix-0"]
    until(lambda: instance.metrics()["xllm_aborted_requests_total"] == 8)
    until(lambda: instance.metrics()["xllm_num_requests_running"] == 0)


def test_a_wrong_registry_is_said(artifact):
    line = run_refused(artifact, "--role", "mix", "--registry", "http://nowhere")
    assert "--registry" in line and "etcd" in line
    line = run_refused(artifact, "--role", "gateway", "--dynamic-roles")
    assert "--ttft-slo-ms" in line
    line = run_refused(artifact, "--role", "gateway", "--colocation")
    assert "--tpot-slo-ms" in line


def test_instances_that_take_less_than_the_artifact_could_say_what_they_take(start_cluster):
    cluster = start_cluster("mix", options=("--max-model-len", "64"))
    assert httpx.get(f"{cluster.gateway.http}/v1/models").json()["data"][0]["max_model_len"] == 64
    # No max_tokens: up to the end of the context that there is.
    body = {"messages": [{"role": "user", "content": "Hi"}], "ignore_eos": True}
    answer = httpx.post(f"{cluster.gateway.http}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["total_tokens"] == 64


def test_an_instance_of_another_model_gets_no_work(start_cluster, family_artifact, expected):
    cluster = start_cluster()
    options = ("--role", "mix", "--registry", cluster.gateway.registry, "--name", "stranger", "--threads", "1")
    with ServeProcess(family_artifact("llama"), *options) as stranger:
        until(lambda: any("stranger" in line and "gets no work" in line for line in cluster.gateway.log))
        cluster.add("mix-0", "mix")
        assert [each["name"] for each in cluster.members()] == ["mix-0"]
        assert complete(cluster.gateway, PROMPTS[0], max_tokens=NUM_TOKENS) == [expected[PROMPTS[0]]]
        assert stranger.metrics()["xllm_engine_steps_total"] == 0
