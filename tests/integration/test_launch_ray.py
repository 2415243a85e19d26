"""xllm-serve --launcher ray on a real Ray cluster of two nodes, which are processes of this machine."""

import signal

import httpx
import pytest

from tests.integration.helpers import until
from tests.integration.serve_process import ServeProcess, run_refused

ray = pytest.importorskip("ray", reason="needs the ray extra: pip install -e '.[ray]'")

pytestmark = pytest.mark.integration

KEY = "key"


@pytest.fixture
def nodes(monkeypatch):
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    cluster.shutdown()


def test_instances_are_spread_and_replaced_with_their_machine(demo_artifact, nodes):
    host = nodes.address.rpartition(":")[0]
    options = ("--launcher", "ray", "--instances", "1P1D", "--host", host, "--api-key", KEY, "--max-model-len", "256")
    assert "give --threads" in run_refused(demo_artifact, *options)
    with ServeProcess(demo_artifact, *options, "--threads", "1") as server:
        client = httpx.Client(base_url=server.http, headers={"authorization": f"Bearer {KEY}"}, timeout=120)

        def active():
            instances = client.get("/cluster").json()["instances"]
            return {each["name"]: each["incarnation"] for each in instances if each["health"] == "active"}

        def text():
            answer = client.post("/v1/completions", json={"prompt": "def f(", "max_tokens": 8, "temperature": 0})
            answer.raise_for_status()
            return answer.json()["choices"][0]["text"]

        before, expected = active(), text()
        assert set(before) == {"prefill-0", "decode-0"}
        # Each of one CPU: with a machine goes one instance, and there is no room for it until there is another.
        lost = next(node for node in nodes.list_all_nodes() if node is not nodes.head_node)
        nodes.remove_node(lost, allow_graceful=False)
        until(lambda: len(active()) == 1)
        assert text() == expected
        nodes.add_node(num_cpus=1)
        until(lambda: len(active()) == 2)
        assert len(before.items() & active().items()) == 1
        assert text() == expected
        server.send(signal.SIGTERM)
        assert server.wait() == 0
