import asyncio

import httpx
import pytest

from tests.scheduler.cluster.test_cluster_client import generate
from tests.scheduler.dashboard.conftest import make_dashboard
from tests.scheduler.service_fixtures import MAX_MODEL_LEN
from xllm_compile.scheduler.dashboard import dashboard as dashboard_module
from xllm_compile.scheduler.dashboard.dashboard import MAX_SAMPLES, Dashboard, DashboardConfig
from xllm_compile.scheduler.dashboard.reading import read_server
from xllm_compile.scheduler.http_api import build_app
from xllm_compile.scheduler.service import Service


def http_client(service, dashboard):
    transport = httpx.ASGITransport(app=build_app(service, dashboard.routes()))
    return httpx.AsyncClient(transport=transport, base_url="http://test")


async def test_a_server_is_one_instance(service):
    dashboard = make_dashboard(service)
    async with http_client(service, dashboard) as client:
        dashboard.take()
        await client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 5})
        dashboard.take()
        content = (await client.get("/dashboard/data")).json()
    first, second = content["samples"]
    assert list(second["instances"]) == ["counter"]
    row = dict(zip(content["instance_fields"], second["instances"]["counter"], strict=True))
    assert (row["pool"], row["health"], row["running"]) == ("mix", "active", 0)
    assert second["service"]["num_generated_tokens"] > 0 and second["service"]["requests_ok"] > 0
    assert first["service"]["ttft_ms_p95"] is None and second["service"]["ttft_ms_p95"] > 0
    assert second["service"]["num_exact_steps"] > 0
    assert (content["is_gateway"], content["ttft_slo_ms"], content["next"]) == (False, 200, 2)


async def test_a_gateway_shows_its_instances(make_cluster):
    cluster = await make_cluster(a={}, b={})
    service = cluster.instances["a"].service
    dashboard = make_dashboard(service, cluster.cluster)
    dashboard.take()
    await generate(cluster)
    await cluster.until(
        lambda: sum(each.load.counters.num_generated_tokens for each in cluster.cluster.instances()) > 0
    )
    dashboard.take()
    async with http_client(service, dashboard) as client:
        content = (await client.get("/dashboard/data")).json()
    second = content["samples"][1]
    assert sorted(second["instances"]) == ["a", "b"]
    assert second["service"]["cluster_num_placed"] > 0
    assert second["service"]["num_generated_tokens"] > 0


async def test_a_viewer_asks_for_what_is_new(service):
    dashboard = make_dashboard(service)
    async with http_client(service, dashboard) as client:
        dashboard.take()
        first = (await client.get("/dashboard/data")).json()
        dashboard.take()
        query = {"since": first["next"], "epoch": first["epoch"]}
        second = (await client.get("/dashboard/data", params=query)).json()
        assert len(first["samples"]) == len(second["samples"]) == 1
        # A page that was open when the server started anew.
        restarted = (await client.get("/dashboard/data", params=query | {"epoch": "before"})).json()
        assert len(restarted["samples"]) == 2


async def test_the_past_is_bounded(service):
    dashboard = make_dashboard(service)
    for _ in range(MAX_SAMPLES + 3):
        dashboard.take()
    async with http_client(service, dashboard) as client:
        assert len((await client.get("/dashboard/data")).json()["samples"]) == MAX_SAMPLES


@pytest.mark.parametrize("since", ["x", "-1", "1.5", "", "9" * 20])
async def test_a_bad_number_is_refused(service, since):
    async with http_client(service, make_dashboard(service)) as client:
        response = await client.get("/dashboard/data", params={"since": since})
    assert response.status_code == 400
    assert f"since='{since}'" in response.json()["error"]["message"]


async def test_the_page_is_open_and_its_data_is_not(engine):
    service = Service(
        engine=engine,
        tokenizer=engine.engine.tokenizer,
        model_names=("counter",),
        max_model_len=MAX_MODEL_LEN,
        version="1",
        api_keys=("secret",),
    )
    async with http_client(service, make_dashboard(service)) as client:
        page = await client.get("/dashboard")
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
        assert "counter" not in page.text
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "/* script */" not in page.text and "/* style */" not in page.text
        assert (await client.get("/dashboard/data")).status_code == 401
        allowed = await client.get("/dashboard/data", headers={"authorization": "Bearer secret"})
        assert allowed.status_code == 200


async def test_a_failing_sample_does_not_end_the_dashboard(service, caplog, monkeypatch):
    monkeypatch.setattr(dashboard_module, "PERIOD_S", 0.0)
    num_read, read_again = 0, asyncio.Event()

    def read(now_s):
        nonlocal num_read
        num_read += 1
        if num_read == 1:
            raise RuntimeError("no stats")
        read_again.set()
        return read_server(service, now_s)

    async with Dashboard(read, DashboardConfig(title="counter", version="1")) as dashboard:
        async with asyncio.timeout(10):
            await read_again.wait()
        assert "no stats" in caplog.text
        assert dashboard.history.next_number > 0
