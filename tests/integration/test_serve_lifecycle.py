"""xllm-serve from start to end: refusals at the start, limits, keys, drain and signals."""

import json
import signal
import socket
import subprocess

import httpx
import pytest

from tests.integration.helpers import LONG, PROMPT, until
from tests.integration.serve_process import ServeProcess, run_refused, serve_command

pytestmark = pytest.mark.integration

LONG_STREAM = LONG | {"stream": True}


def test_beyond_this_machine_a_key_is_wanted(demo_artifact):
    assert "--allow-unauthenticated" in run_refused(demo_artifact, "--host", "0.0.0.0", "--port", "0")


def test_a_model_directory_is_answered_with_the_command_to_run(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    line = run_refused(tmp_path)
    assert f"xllm-compile {tmp_path}" in line
    assert "min" in line
    assert "--compile" in line


def test_what_is_neither_artifact_nor_model_is_named(tmp_path):
    assert "neither" in run_refused(tmp_path)
    assert "does not exist" in run_refused(tmp_path / "missing")


def test_bad_options_are_one_line(demo_artifact):
    assert "--kv-memory" in run_refused(demo_artifact, "--kv-memory", "lots")
    assert "--port" in run_refused(demo_artifact, "--port", "70000")
    assert "max_model_len" in run_refused(
        demo_artifact, "--port", "0", "--grpc-port", "0", "--max-model-len", "99999999"
    )


def test_a_port_that_is_taken_is_said_before_the_model_loads(demo_artifact):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"127.0.0.1:{port}" in run_refused(demo_artifact, "--port", port)
        assert f"127.0.0.1:{port}" in run_refused(demo_artifact, "--port", "0", "--grpc-port", port)


def test_the_key_comes_from_the_environment(demo_artifact, monkeypatch):
    monkeypatch.setenv("XLLM_API_KEY", "secret")
    with ServeProcess(demo_artifact) as server:
        assert httpx.get(f"{server.http}/v1/models").status_code == 401
        good = httpx.get(f"{server.http}/v1/models", headers={"authorization": "Bearer secret"})
        assert good.status_code == 200
        assert httpx.get(f"{server.http}/health").status_code == 200


def test_streams_beyond_the_limit_are_refused_and_the_server_stays_up(demo_artifact):
    with ServeProcess(demo_artifact, "--max-streams", "3") as server:
        url = f"{server.http}/v1/completions"
        # A stream is taken with the first byte of a request, and held while its body is on its way.
        held = [socket.create_connection((server.host, server.http_port)) for _ in range(3)]
        for connection in held:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
        until(lambda: server.metrics()["xllm_open_streams"] == 3)
        for _ in range(50):
            refused = httpx.post(url, json=LONG_STREAM)
            assert refused.status_code == 429
            # How long is predicted from this machine's steps.
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["type"] == "rate_limit_error"
        assert httpx.get(f"{server.http}/health").status_code == 200
        for connection in held:
            connection.close()
        until(lambda: httpx.post(url, json={"prompt": PROMPT, "max_tokens": 1}).status_code == 200)


def test_a_full_queue_is_429(demo_artifact):
    with ServeProcess(demo_artifact, "--max-num-seqs", "1", "--max-waiting", "1") as server, httpx.Client() as client:
        url = f"{server.http}/v1/completions"
        # An empty queue takes a request whole: one sequence runs, seven wait.
        with client.stream("POST", url, json=LONG_STREAM) as running:
            lines = running.iter_lines()
            next(lines)
            refused = httpx.post(url, json={"prompt": PROMPT})
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "queue_full"
            # How long is predicted from this machine's steps.
            assert int(refused.headers["retry-after"]) >= 1


def test_connections_beyond_the_limit_are_refused(demo_artifact):
    with ServeProcess(demo_artifact, "--max-connections", "2") as server:
        held = [socket.create_connection((server.host, server.http_port)) for _ in range(2)]
        refused = httpx.get(f"{server.http}/health")
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "too_many_connections"
        for connection in held:
            connection.close()
        until(lambda: httpx.get(f"{server.http}/health").status_code == 200)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_what_runs_and_refuses_the_rest(demo_artifact, number):
    with ServeProcess(demo_artifact, "--drain-timeout", "600") as server, httpx.Client() as client:
        with client.stream("POST", f"{server.http}/v1/completions", json=LONG_STREAM, timeout=600) as stream:
            lines = stream.iter_lines()
            events = [next(lines)]
            server.send(number)
            until(lambda: httpx.get(f"{server.http}/health").status_code == 503)
            refused = httpx.post(f"{server.http}/v1/completions", json=LONG_STREAM)
            assert refused.status_code == 503
            # How long is predicted from this machine's steps.
            assert int(refused.headers["retry-after"]) >= 1
            events += [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert server.wait() == 0


def test_a_drain_ends_at_its_bound(demo_artifact):
    with ServeProcess(demo_artifact, "--drain-timeout", "0.2") as server, httpx.Client() as client:
        with client.stream("POST", f"{server.http}/v1/completions", json=LONG_STREAM, timeout=600) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.send(signal.SIGTERM)
            events = [line for line in lines if line]
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "aborted"
        assert events[-1] == "data: [DONE]"
        assert server.wait() == 1
    assert any("--drain-timeout" in line for line in server.log)


def test_a_second_signal_stops_at_once(demo_artifact):
    with (
        ServeProcess(demo_artifact, "--drain-timeout", "600") as server,
        httpx.Client() as client,
        client.stream("POST", f"{server.http}/v1/completions", json=LONG_STREAM, timeout=600) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        server.send(signal.SIGTERM)
        until(lambda: httpx.get(f"{server.http}/health").status_code == 503)
        server.send(signal.SIGTERM)
        assert server.wait() == 128 + signal.SIGTERM


# The compiler, and what some requests and options need: each is a good part of a start.
NOT_FOR_EVERY_START = {
    "torch._dynamo",
    "torch._inductor",
    "torch._functorch.aot_autograd",
    "torch._export",
    "torch._decomp",
    "torch.utils.data.dataloader",
    "sympy",
    "networkx",
    "transformers",
    "xllm_compile.build",
    "xllm_compile.cli",
    "jinja2",
    "llguidance",
    "mooncake",
    "nixl",
    "opentelemetry",
    "ray",
    "rich",
}


def test_a_start_imports_what_it_needs_and_resumes_the_collector(demo_artifact):
    code = (
        "import gc, sys, os, signal\n"
        "from xllm_compile.scheduler.serve import command\n"
        "import xllm_compile.scheduler.startup as startup\n"
        "announce = startup.announce\n"
        "def stop(*ports):\n"
        "    announce(*ports)\n"
        "    assert gc.isenabled()\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "startup.announce = stop\n"
        "command.main(sys.argv[1:], standalone_mode=False)\n"
        "print(*sys.modules)\n"
    )
    command = serve_command(demo_artifact, "--port", "0", "--grpc-port", "0")
    done = subprocess.run(
        [command[0], "-c", code, *command[3:]], capture_output=True, text=True, check=True, timeout=120
    )
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "torch" in loaded
    assert not loaded & NOT_FOR_EVERY_START
