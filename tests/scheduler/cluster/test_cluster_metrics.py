import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.scheduler.cluster.test_cluster_client import generate
from xllm_compile.scheduler.cluster.cluster_api import ClusterApi
from xllm_compile.scheduler.cluster.cluster_metrics import ClusterCollector
from xllm_compile.scheduler.http_api import build_app


async def test_instances_and_placements_show(make_cluster):
    cluster = await make_cluster(a={}, b={})
    service = cluster.instances["a"].service
    service.metrics.register(ClusterCollector(cluster.cluster))
    await generate(cluster)
    families = text_string_to_metric_families(service.render_metrics().decode())
    samples = {(each.name, *each.labels.values()): each.value for family in families for each in family.samples}
    assert samples["xllm_instances", "active", "mix"] == 2
    assert samples["xllm_instances", "suspect", "decode"] == 0
    assert samples["xllm_instance_kv_tokens_capacity", "b"] == 1024
    assert samples["xllm_instance_kv_blocks", "a"] == 0
    assert samples["xllm_placements_total",] == 1
    assert samples["xllm_placements_lost_total",] == 0


async def test_the_cluster_page(make_cluster):
    cluster = await make_cluster(a={}, b={})
    app = build_app(cluster.instances["a"].service, ClusterApi(cluster.cluster).routes())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
        content = (await client.get("/cluster")).json()
    assert [each["name"] for each in content["instances"]] == ["a", "b"]
    assert content["instances"][0]["pool"] == "mix"
    assert content["instances"][0]["load"]["num_running"] == 0
    assert content["counts"]["num_lost"] == 0
