"""xllm-serve --instances: one command for a whole service."""

import os
import signal
from pathlib import Path

import httpx
import pytest

from tests.integration.helpers import until
from tests.integration.serve_process import ServeProcess, run_refused
from tests.scheduler.certificates import Authority

pytestmark = pytest.mark.integration


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_service_of_one_command_survives_its_parts_and_leaves_nobody_behind(demo_artifact, tmp_path):
    ca = Authority(tmp_path)
    issued = ca.issue("server")
    options = ("--tls-cert", str(issued.cert), "--tls-key", str(issued.key), "--api-key", "k", "--max-model-len", "256")
    with ServeProcess(demo_artifact, "--instances", "1P1D", *options) as server:
        client = httpx.Client(
            base_url=server.http.replace("http:", "https:"),
            verify=ca.tls().client_context(),
            headers={"authorization": "Bearer k"},
            timeout=120,
        )

        def active():
            try:
                instances = client.get("/cluster").json()["instances"]
            except httpx.TransportError:
                return {}
            return {each["name"]: each["incarnation"] for each in instances if each["health"] == "active"}

        def text():
            answer = client.post("/v1/completions", json={"prompt": "def f(", "max_tokens": 8, "temperature": 0})
            answer.raise_for_status()
            return answer.json()["choices"][0]["text"]

        first = active()
        assert set(first) == {"prefill-0", "decode-0"}
        expected = text()
        gateway, *instances = children(server.process.pid)
        assert len(instances) == 2
        os.kill(instances[0], signal.SIGKILL)
        until(lambda: len(active()) == 2 and active() != first)
        assert text() == expected
        # It comes back where it was, and the instances find it.
        os.kill(gateway, signal.SIGKILL)
        until(lambda: not is_running(gateway) and len(active()) == 2)
        assert text() == expected
        everybody = children(server.process.pid)
        assert len(everybody) == 3
        server.send(signal.SIGKILL)
        until(lambda: not any(map(is_running, everybody)))


def test_sigterm_drains_all(demo_artifact):
    with ServeProcess(demo_artifact, "--instances", "2M") as server:
        everybody = children(server.process.pid)
        server.send(signal.SIGTERM)
        assert server.wait() == 0
        assert not any(map(is_running, everybody))


def test_refusals(demo_artifact):
    ports = ("--port", "0", "--grpc-port", "0")
    assert "--instances 2X must be" in run_refused(demo_artifact, "--instances", "2X")
    assert "--role does not go with" in run_refused(demo_artifact, "--instances", "2M", "--role", "mix")
    assert "give --api-key" in run_refused(demo_artifact, "--instances", "2M", "--host", "0.0.0.0", *ports)
    assert "add them" in run_refused(demo_artifact, "--launcher", "ray")
    on_ray = ("--launcher", "ray", "--instances", "2M", "--api-key", "k")
    assert "of this machine only" in run_refused(demo_artifact, *on_ray)
    # Found by an instance.
    line = run_refused(demo_artifact, "--instances", "1M", "--max-model-len", "99999999", *ports)
    assert "mix-0: " in line
    assert "max_model_len" in line
