"""The batch API of xllm-serve as a process, used through the official OpenAI client: killed, restarted, busy."""

import io
import json
import re
import shutil
import signal
from contextlib import closing

import httpx
import openai
import pytest

from tests.integration.cluster_processes import Cluster, busiest
from tests.integration.helpers import PROMPT, until
from tests.integration.serve_process import ServeProcess, run_refused

pytestmark = pytest.mark.integration

NUM_LINES = 200


@pytest.fixture
def serve(demo_artifact, tmp_path):
    def serve(*options):
        return ServeProcess(
            demo_artifact, "--served-model-name", "demo", "--batch-dir", str(tmp_path / "batches"), *options
        )

    return serve


def client_of(server):
    return openai.OpenAI(base_url=f"{server.http}/v1", api_key="unused", max_retries=0)


def input_file(num_lines, **body):
    body = {"model": "demo", "messages": [{"role": "user", "content": PROMPT}], "temperature": 0} | body
    lines = [
        {"custom_id": f"id-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        for number in range(num_lines)
    ]
    file = io.BytesIO("".join(json.dumps(line) + "\n" for line in lines).encode())
    file.name = "requests.jsonl"
    return file


def create(client, num_lines, **body):
    uploaded = client.files.create(file=input_file(num_lines, **body), purpose="batch")
    return client.batches.create(
        input_file_id=uploaded.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"for": "a test"},
    )


def is_ended(client, batch_id):
    return client.batches.retrieve(batch_id).status in ("completed", "failed", "expired", "cancelled")


def results(client, file_id):
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def test_killed_in_the_middle_and_restarted(serve):
    with serve() as server, client_of(server) as client:
        batch = create(client, NUM_LINES, max_tokens=24)
        until(lambda: client.batches.retrieve(batch.id).request_counts.completed >= 20)
        told = client.batches.retrieve(batch.id)
        assert told.status == "in_progress" and told.request_counts.completed < NUM_LINES
        server.send(signal.SIGKILL)
        server.wait()
    with serve() as server, client_of(server) as client:
        assert client.batches.retrieve(batch.id).request_counts.completed >= told.request_counts.completed
        until(lambda: is_ended(client, batch.id))
        ended = client.batches.retrieve(batch.id)
        assert ended.status == "completed" and ended.metadata == {"for": "a test"}
        counts = ended.request_counts
        assert (counts.total, counts.completed, counts.failed) == (NUM_LINES, NUM_LINES, 0)
        found = results(client, ended.output_file_id)
        assert sorted(result["custom_id"] for result in found) == sorted(f"id-{n}" for n in range(NUM_LINES))
        assert {result["response"]["status_code"] for result in found} == {200}
        assert ended.usage.output_tokens == sum(
            result["response"]["body"]["usage"]["completion_tokens"] for result in found
        )
        # Lines that were done are not run again: this server answered the others only.
        metrics = server.metrics()
        num_here = metrics['xllm_batch_lines_total{outcome="completed"}']
        assert num_here <= NUM_LINES - told.request_counts.completed
        assert client.files.delete(ended.output_file_id).deleted
        assert [file.id for file in client.files.list(purpose="batch")] == [batch.input_file_id]
        assert [each.id for each in client.batches.list()] == [batch.id]
        server.send(signal.SIGTERM)
        assert server.wait() == 0


def test_an_instance_and_the_gateway_are_killed(demo_artifact, tmp_path):
    """Nothing is lost, and every line is answered once."""
    given = ("--served-model-name", "demo", "--batch-dir", str(tmp_path / "batches"))
    cluster = Cluster(demo_artifact, ("mix", "mix"), gateway_options=given)
    with closing(cluster):
        with client_of(cluster.gateway) as client:
            batch = create(client, NUM_LINES, max_tokens=48, ignore_eos=True)
            until(lambda: client.batches.retrieve(batch.id).request_counts.completed >= 20)
            cluster.instances[busiest(cluster)].send(signal.SIGKILL)
            until(lambda: client.batches.retrieve(batch.id).request_counts.completed >= 60)
            told = client.batches.retrieve(batch.id).request_counts
            cluster.gateway.send(signal.SIGKILL)
            cluster.gateway.wait()
        port = cluster.gateway.registry.rpartition(":")[2]
        with (
            ServeProcess(demo_artifact, "--role", "gateway", "--registry-port", port, *given) as gateway,
            client_of(gateway) as client,
        ):
            assert client.batches.retrieve(batch.id).request_counts.completed >= told.completed
            until(lambda: is_ended(client, batch.id))
            ended = client.batches.retrieve(batch.id)
            counts = ended.request_counts
            assert (counts.total, counts.completed, counts.failed) == (NUM_LINES, NUM_LINES, 0)
            found = results(client, ended.output_file_id)
            assert sorted(result["custom_id"] for result in found) == sorted(f"id-{n}" for n in range(NUM_LINES))
            assert all(result["response"]["body"]["usage"]["completion_tokens"] == 48 for result in found)


def test_online_requests_go_first_and_a_signal_ends_the_server(serve):
    """Lines under way at the end of the drain are run by the next server."""
    with serve("--max-num-seqs", "2", "--drain-timeout", "600") as server, client_of(server) as client:
        batch = create(client, 30, max_tokens=300)
        until(lambda: server.metrics()['xllm_sequences{class="offline",state="running"}'] == 2)
        for _ in range(5):
            client.completions.create(model="demo", prompt=PROMPT, max_tokens=2, temperature=0)
        # They did not queue behind the lines that wait.
        assert client.batches.retrieve(batch.id).request_counts.completed < 30
        assert server.metrics()['xllm_class_preemptions_total{class="offline"}'] > 0
        server.send(signal.SIGTERM)
        assert server.wait() == 0
    with serve() as server, client_of(server) as client:
        client.batches.cancel(batch.id)
        until(lambda: is_ended(client, batch.id))
        ended = client.batches.retrieve(batch.id)
        assert ended.status == "cancelled" and ended.request_counts.failed == 0


def test_errors_of_the_client(serve):
    with serve("--batch-max-file-size", "1MiB") as server, client_of(server) as client:
        with pytest.raises(openai.NotFoundError, match="no batch"):
            client.batches.retrieve("batch_none")
        with pytest.raises(openai.APIStatusError, match="--batch-max-file-size") as raised:
            client.files.create(file=input_file(1, user="x" * (2 << 20)), purpose="batch")
        assert raised.value.status_code == 413
        with pytest.raises(openai.BadRequestError, match="fine-tune"):
            client.files.create(file=input_file(1), purpose="fine-tune")
        batch = create(client, 1, model="gpt-4")
        until(lambda: is_ended(client, batch.id))
        failed = client.batches.retrieve(batch.id)
        assert failed.status == "failed" and failed.errors.data[0].line == 1
        assert failed.errors.data[0].code == "model_not_found"


def test_the_key_protects_files_and_batches(serve):
    with serve("--api-key", "secret") as server:
        for path in ("/v1/files", "/v1/files/file-x/content", "/v1/batches"):
            assert httpx.get(server.http + path).status_code == 401
            assert httpx.get(server.http + path, headers={"authorization": "Bearer secret"}).status_code != 401


def test_one_server_per_folder_and_options_that_need_it(serve, demo_artifact, tmp_path):
    with serve() as server:
        given = ("--port", "0", "--grpc-port", "0", "--batch-dir", str(tmp_path / "batches"))
        holder = rf"in use by another server \(process {server.process.pid} on "
        # Found out before the model is loaded: its manifest is all that is read here.
        manifest = shutil.copytree(demo_artifact, tmp_path / "no_weights.xllm", ignore=lambda *_: ["weights", "graphs"])
        for artifact, *options in ((manifest,), (demo_artifact, "--role", "gateway", "--registry-port", "0")):
            assert re.search(holder, run_refused(artifact, *given, *options))
    assert "--batch-dir" in run_refused(demo_artifact, "--port", "0", "--grpc-port", "0", "--batch-max-lines", "5")
