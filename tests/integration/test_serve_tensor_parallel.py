"""xllm-serve on an artifact of two ranks: the processes it starts, what they answer, and that they end with it."""

import signal
from pathlib import Path

import httpx
import pytest

from tests.helpers import compile_model
from tests.integration.helpers import until
from tests.integration.serve_process import ServeProcess, run_refused

pytestmark = pytest.mark.integration

REQUEST = {"prompt": "def add(a, b):\n", "max_tokens": 12, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def artifact(tiny_model_dir, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("serve") / "tp2.xllm"
    options = ("--dtype", "float32", "--max-num-batched-tokens", "64", "--graph-mode", "eager")
    done = compile_model(tiny_model_dir("qwen3"), "-o", output, *options, "--tensor-parallel-size", "2")
    assert done.returncode == 0, done.stderr
    return output


def followers(pid: int) -> list[int]:
    found = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return [child for child in found if "runtime.follower" in Path(f"/proc/{child}/cmdline").read_text()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_two_ranks_serve_and_end_together(artifact, number):
    with ServeProcess(artifact) as server:
        (follower,) = followers(server.process.pid)
        answers = [httpx.post(f"{server.http}/v1/completions", json=REQUEST, timeout=120).json() for _ in range(2)]
        texts = [answer["choices"][0]["text"] for answer in answers]
        assert texts[0] == texts[1]
        assert answers[0]["usage"]["completion_tokens"] == 12
        server.send(number)
        assert server.wait() == (0 if number == signal.SIGTERM else -number)
    # The kernel ends it with rank 0; whoever inherits it reaps it.
    until(lambda: is_gone(follower))


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--role", "prefill"), "move the KV of one rank, and the artifact has 2"),
        (("--kv-host-memory", "16MiB"), "tiers hold the KV of one rank, and the artifact has 2; leave it out"),
        (("--kv-swap-memory", "16MiB"), "only the KV of one rank is copied out, and the artifact has 2; leave it out"),
    ],
)
def test_the_kv_of_ranks_is_neither_sent_nor_copied_out(artifact, options, message):
    assert message in run_refused(artifact, *options)
