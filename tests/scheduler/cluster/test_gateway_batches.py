"""The batch API over several instances."""

from tests.scheduler.batches.batch_fixtures import BatchServer, line


async def test_a_batch_runs_on_all_instances(make_cluster, tmp_path):
    cluster = await make_cluster(a={}, b={})
    server = await BatchServer(cluster.client, tmp_path).start()
    created = await server.create([line(f"{number}", prompt="A", max_tokens=50) for number in range(40)])
    ended = await server.ended(created["id"])
    assert ended["request_counts"] == {"total": 40, "completed": 40, "failed": 0}
    assert all(instance.runner.num_steps for instance in cluster.instances.values())
    results = await server.content(ended["output_file_id"])
    texts = {result["response"]["body"]["choices"][0]["text"] for result in results}
    assert texts == {"".join(chr(ord("A") + number) for number in range(1, 51))}
    await server.stop()
