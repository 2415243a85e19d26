"""A server with TLS and two keys, as its users meet it."""

from contextlib import ExitStack

import grpc
import httpx
import pytest

from tests.integration.helpers import until
from tests.integration.serve_process import ServeProcess, run_refused
from tests.scheduler.certificates import Authority
from xllm_compile.scheduler.proto import xllm_pb2, xllm_pb2_grpc

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def ca(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ca"))


def test_both_ports_speak_tls_and_take_the_old_key_and_the_new(demo_artifact, ca):
    issued = ca.issue("server")
    files = ("--tls-cert", str(issued.cert), "--tls-key", str(issued.key))
    with ServeProcess(demo_artifact, *files, "--api-key", "new", "--api-key", "old") as server:
        url = server.http.replace("http:", "https:")
        context = ca.tls().client_context()
        for key in ("new", "old"):
            headers = {"authorization": f"Bearer {key}"}
            assert httpx.get(f"{url}/v1/models", headers=headers, verify=context).status_code == 200
            credentials = ca.tls().channel_credentials()
            with grpc.secure_channel(server.grpc, credentials) as channel:
                stub = xllm_pb2_grpc.InferenceStub(channel)
                metadata = (("authorization", f"Bearer {key}"),)
                info = stub.GetServerInfo(xllm_pb2.GetServerInfoRequest(), metadata=metadata, timeout=10)
                assert info.model_names
        assert httpx.get(f"{url}/v1/models", verify=context).status_code == 401
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{server.http}/health")


def test_refusals_before_anything_starts(demo_artifact, ca, tmp_path):
    issued, bad = ca.issue("server"), tmp_path / "bad.pem"
    bad.write_text("nothing")
    assert "needs --tls-key" in run_refused(demo_artifact, "--tls-cert", str(issued.cert))
    files = ("--tls-cert", str(issued.cert), "--tls-key", str(issued.key))
    assert "bad.pem" in run_refused(demo_artifact, "--tls-cert", str(bad), "--tls-key", str(issued.key))
    assert "must not be empty" in run_refused(demo_artifact, "--api-key", "")
    gateway = ("--role", "gateway", "--port", "0", "--grpc-port", "0", "--registry-port", "0")
    line = run_refused(demo_artifact, *gateway, "--registry-host", "0.0.0.0")
    assert "--registry-host 0.0.0.0: the registry is reachable" in line
    line = run_refused(demo_artifact, *gateway, *files, "--registry-host", "0.0.0.0", "--api-key", "k")
    assert "--tls-cert without --tls-ca" in line
    assert "needs a certificate" in run_refused(demo_artifact, *gateway, "--tls-ca", str(ca.cert))


def test_a_cluster_speaks_tls_throughout_and_knows_strangers(demo_artifact, ca, tmp_path):
    def files(authority, name):
        issued = authority.issue(name)
        return ("--tls-cert", str(issued.cert), "--tls-key", str(issued.key), "--tls-ca", str(authority.cert))

    common = ("--api-key", "k", "--tls-client-auth")
    instance = (*common, "--transfer-secret", "s", "--threads", "1", "--max-model-len", "256")
    with ExitStack() as stack:

        def start(*options):
            return stack.enter_context(ServeProcess(demo_artifact, *options))

        gateway = start("--role", "gateway", "--registry-port", "0", *common, *files(ca, "gateway"))
        client = httpx.Client(
            base_url=gateway.http.replace("http:", "https:"),
            verify=ca.tls(ca.issue("client")).client_context(),
            headers={"authorization": "Bearer k"},
            timeout=120,
        )

        def active():
            return {each["name"] for each in client.get("/cluster").json()["instances"] if each["health"] == "active"}

        for role in ("prefill", "decode"):
            start("--role", role, "--name", role, "--registry", gateway.registry, *instance, *files(ca, role))
        until(lambda: active() == {"prefill", "decode"})
        answer = client.post("/v1/completions", json={"prompt": "def f(" * 20, "max_tokens": 8})
        assert answer.status_code == 200, answer.text
        stranger = Authority(tmp_path, "stranger")
        lost = start("--role", "mix", "--name", "x", "--registry", gateway.registry, *instance, *files(stranger, "x"))
        until(lambda: any("could not register" in line and gateway.registry in line for line in lost.log))
        assert any("was not issued by the CA of --tls-ca" in line for line in lost.log)
        assert active() == {"prefill", "decode"}
