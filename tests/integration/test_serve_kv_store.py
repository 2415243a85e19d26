"""xllm-serve with a mooncake_master on this machine: what one instance had to evict, another one reads."""

import importlib.util
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.integration.helpers import until
from tests.integration.serve_process import ServeProcess, run_refused
from tests.runtime.transfer.libraries import needs_library
from xllm_compile.benchmarks.child_process import free_port
from xllm_compile.scheduler.proto import xllm_pb2, xllm_pb2_grpc

pytestmark = pytest.mark.integration

# Pages for one prompt and a half; what leaves them leaves host memory at once.
SMALL = ("--max-num-seqs", "2", "--max-model-len", "640", "--kv-memory", "1MiB", "--threads", "1")


@pytest.fixture
def master(tmp_path) -> Iterator[tuple[subprocess.Popen, str]]:
    needs_library("mooncake")
    spec = importlib.util.find_spec("mooncake")
    assert spec is not None and spec.submodule_search_locations is not None
    program = Path(spec.submodule_search_locations[0]) / "mooncake_master"
    program.chmod(program.stat().st_mode | 0o100)
    port, metrics_port = free_port(), free_port()
    options = ["--rpc_port", str(port), "--metrics_port", str(metrics_port), "--enable_http_metadata_server=false"]
    with (tmp_path / "master.log").open("w") as log:
        process = subprocess.Popen([program, *options], stdout=log, stderr=log)
    try:
        until(lambda: is_open(port))
        yield process, f"mooncake://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def prompt(seed: int) -> list[int]:
    return [(7 * at * at + seed * at + seed) % 4000 + 5 for at in range(500)]


def ask(process: ServeProcess, token_ids: list[int]) -> tuple[list[int], int]:
    """The tokens, and how many of the prompt were cached."""
    with grpc.insecure_channel(process.grpc) as channel:
        sampling = xllm_pb2.SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        request = xllm_pb2.GenerateRequest(
            token_ids=xllm_pb2.TokenIds(ids=token_ids), sampling=sampling, final_only=True
        )
        (answer,) = xllm_pb2_grpc.InferenceStub(channel).Generate(request, timeout=120)
    return list(answer.choices[0].token_ids), answer.usage.cached_tokens


def blocks(process: ServeProcess, event: str) -> float:
    return process.metrics()[f'xllm_kv_tier_blocks_total{{event="{event}"}}']


def test_what_one_evicts_another_reads_and_a_store_that_is_gone_is_a_miss(family_artifact, master):
    artifact = family_artifact("qwen3")
    process, address = master
    shared = ("--kv-store", address, "--kv-store-size", "64MiB")
    with (
        ServeProcess(artifact, *SMALL, "--kv-host-memory", "64KiB", *shared) as here,
        ServeProcess(artifact, *SMALL, "--kv-host-memory", "64MiB", *shared) as there,
    ):
        # Until its client is connected blocks are dropped.
        rounds = iter(range(1, 100))
        until(lambda: [ask(here, prompt(next(rounds) % 3)) for _ in range(3)] and blocks(here, "stored") > 90)
        expected = [ask(here, prompt(seed))[0] for seed in range(3)]
        until(lambda: ask(there, prompt(0))[1] >= 16)
        fetched = blocks(there, "fetched")
        assert fetched > 0
        answers = [ask(there, prompt(seed)) for seed in (1, 2)]
        assert [tokens for tokens, _ in answers] == expected[1:]
        assert max(cached for _, cached in answers) >= 16
        process.kill()
        process.wait()
        assert ask(there, prompt(7))[1] == 0
        assert ask(there, prompt(0))[0] == expected[0]
        until(lambda: "the KV store is left out until it answers" in "".join(there.log))


def test_options_that_do_not_go_together(family_artifact):
    artifact = family_artifact("qwen3")
    store = ("--kv-store", "mooncake://127.0.0.1:1")
    assert "give kv_host_bytes (--kv-host-memory) as well" in run_refused(artifact, *store)
    host = ("--kv-host-memory", "1MiB")
    assert "must be mooncake://HOST:PORT" in run_refused(artifact, *host, "--kv-store", "redis://127.0.0.1:1")
    if importlib.util.find_spec("mooncake") is None:
        assert "pip install 'xllm-compile[mooncake]'" in run_refused(artifact, *host, *store)
