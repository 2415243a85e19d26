"""Two artifacts in one process, which share their memory."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import httpx
import pytest

from tests.integration.serve_process import ServeProcess, run_refused
from xllm_compile.runtime.artifact import read_manifest
from xllm_compile.runtime.memory.cpu_memory import HUGE_PAGE_BYTES
from xllm_compile.scheduler.proto import xllm_pb2, xllm_pb2_grpc

pytestmark = pytest.mark.integration

NAMES = ("--served-model-name", "demo", "--served-model-name", "tiny")
# One page holds a sequence of either model.
LENGTH = ("--max-model-len", "256")
NUM_KV_PAGES = 12


@pytest.fixture(scope="module")
def artifacts(demo_artifact, family_artifact) -> list[Any]:
    return [demo_artifact, family_artifact("qwen3")]


def num_weight_pages(artifact) -> int:
    return -(-read_manifest(artifact).weights[0].num_bytes // HUGE_PAGE_BYTES)


@pytest.fixture(scope="module")
def server(artifacts) -> Iterator[ServeProcess]:
    memory = (sum(map(num_weight_pages, artifacts)) + NUM_KV_PAGES) * HUGE_PAGE_BYTES
    options = (str(artifacts[1]), *NAMES, *LENGTH, "--memory", str(memory))
    with ServeProcess(artifacts[0], *options) as server:
        yield server


def complete(server: ServeProcess, model: str, prompt: str = "def add(a, b):\n", **options: Any) -> httpx.Response:
    body = {"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **options}
    return httpx.post(f"{server.http}/v1/completions", json=body, timeout=120)


def text(server: ServeProcess, model: str, prompt: str = "def add(a, b):\n", **options: Any) -> str:
    answer = complete(server, model, prompt, **options)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model
    return str(answer.json()["choices"][0]["text"])


def num_pages(server: ServeProcess, model: str) -> float:
    """KV pages that the model has."""
    start = f'xllm_kv_pages{{model_name="{model}",'
    return sum(value for name, value in server.metrics().items() if name.startswith(start))


def post(server: ServeProcess, path: str) -> httpx.Response:
    return httpx.post(f"{server.http}{path}", timeout=120)


def fill(server: ServeProcess, model: str) -> list[str]:
    """More sequences at once than there are pages."""
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda index: text(server, model, f"{index} = {index}" * 20, max_tokens=90), range(16)))


def test_each_request_finds_its_model(server):
    listed = httpx.get(f"{server.http}/v1/models").json()["data"]
    assert [card["id"] for card in listed] == ["demo", "tiny"]
    assert text(server, "demo") != text(server, "tiny")
    missing = complete(server, "large")
    assert missing.status_code == 404 and "this server has 'demo', 'tiny'" in missing.text
    with grpc.insecure_channel(server.grpc) as channel:
        stub = xllm_pb2_grpc.InferenceStub(channel)
        assert list(stub.GetServerInfo(xllm_pb2.GetServerInfoRequest()).model_names) == ["demo", "tiny"]
        sampling = xllm_pb2.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        request = xllm_pb2.GenerateRequest(model="tiny", text="def add(a, b):\n", sampling=sampling, final_only=True)
        (response,) = stub.Generate(request)
        assert response.choices[0].text == text(server, "tiny")


def test_the_pages_of_a_sleeping_model_serve_the_other_until_it_wakes_up(server):
    before = fill(server, "demo"), fill(server, "tiny")
    assert num_pages(server, "demo") <= NUM_KV_PAGES - 1
    assert post(server, "/sleep?model=tiny").status_code == 200
    assert httpx.get(f"{server.http}/is_sleeping?model=tiny").json() == {"is_sleeping": True}
    refused = complete(server, "tiny")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "asleep")
    assert num_pages(server, "tiny") == 0
    assert fill(server, "demo") == before[0]
    # With what was the other's: its KV and, beyond all KV pages there were, its weights.
    assert num_pages(server, "demo") > NUM_KV_PAGES - 1
    assert post(server, "/wake_up?model=tiny").status_code == 200
    assert (fill(server, "demo"), fill(server, "tiny")) == before


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/sleep", 400, "This server has 'demo', 'tiny'; say which with ?model=NAME"),
        ("/sleep?model=large", 404, "'large' does not exist"),
        ("/wake_up?model=large", 404, "'large' does not exist"),
    ],
)
def test_whom_to_put_to_sleep_is_said_by_name(server, path, status, message):
    answer = post(server, path)
    assert answer.status_code == status and message in answer.json()["error"]["message"]


def test_models_that_do_not_fit_together_take_turns(artifacts, server):
    expected = {name: text(server, name) for name in ("demo", "tiny")}
    memory = (max(map(num_weight_pages, artifacts)) + 1) * HUGE_PAGE_BYTES
    options = (str(artifacts[1]), *NAMES, *LENGTH, "--memory", str(memory))
    assert "the models need" in run_refused(artifacts[0], *options)
    with ServeProcess(artifacts[0], *options, "--wake-on-request") as small, ThreadPoolExecutor(8) as pool:
        states = [httpx.get(f"{small.http}/is_sleeping?model={name}").json()["is_sleeping"] for name in expected]
        assert states == [False, True]
        names = [("demo", "tiny")[index % 2] for index in range(12)]
        assert list(pool.map(lambda name: text(small, name), names)) == [expected[name] for name in names]
        # By hand nobody makes room.
        asleep = next(
            name for name in expected if httpx.get(f"{small.http}/is_sleeping?model={name}").json()["is_sleeping"]
        )
        full = post(small, f"/wake_up?model={asleep}")
        assert (full.status_code, full.json()["error"]["code"]) == (503, "memory_full")
        assert text(small, asleep) == expected[asleep]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--served-model-name", "a"), "is given 1 times for 2 artifacts"),
        (("--served-model-name", "a", "--served-model-name", "a"), "would both be served as 'a'"),
        ((*NAMES, "--memory", "2MiB"), "the models need"),
        ((*NAMES, "--memory", "2MiB", "--wake-on-request"), "model 'demo' needs"),
        ((*NAMES, "--kv-memory", "64MiB"), "kv_memory_bytes=67108864 cannot be combined with several artifacts"),
        ((*NAMES, "--kv-pretouch"), "kv_pretouch=True cannot be combined with several artifacts"),
    ],
)
def test_what_does_not_go_together_is_refused_before_any_work(artifacts, options, message):
    assert message in run_refused(artifacts[0], str(artifacts[1]), *options)
