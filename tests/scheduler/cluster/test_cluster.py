"""Who of those registered is an instance of the service."""

from dataclasses import replace

from tests.scheduler.cluster.cluster_fixtures import FakeInstance
from tests.scheduler.registry.instances import instance
from tests.scheduler.service_fixtures import MAX_MODEL_LEN
from xllm_compile.scheduler.cluster.cluster import Cluster
from xllm_compile.scheduler.cluster.state import Health, Pool


async def members_of(cluster, *infos):
    await cluster.update([(info, Health.ACTIVE) for info in infos])
    return {each.name for each in cluster.instances()}


def named(caplog):
    messages = (record.getMessage() for record in caplog.records)
    return [message.partition(" gets no work")[0] for message in messages if "gets no work" in message]


async def test_other_weights_get_no_work_and_are_named_once_for_each_start(caplog):
    ours, other = instance("a", "1", weights_key="w"), instance("b", "2", weights_key="x", model_names=("other",))
    silent = instance("c", "3")
    cluster = Cluster(weights_key="w")
    try:
        for _ in range(2):
            assert await members_of(cluster, ours, other, silent) == {"a", "c"}
        assert named(caplog) == ["instance b (other)"]
        # Started again with the right ones.
        assert await members_of(cluster, ours, instance("b", "4", weights_key="w")) == {"a", "b"}
        # An instance that is started again with others is none any more.
        assert await members_of(cluster, instance("a", "5", weights_key="x"), instance("b", "4", weights_key="w")) == {
            "b"
        }
        assert named(caplog) == ["instance b (other)", "instance a ()"]
    finally:
        await cluster.close()


async def test_the_longest_that_some_instance_takes(make_cluster):
    fakes = await make_cluster(a={})
    assert fakes.cluster.max_model_len() == MAX_MODEL_LEN
    fakes.instances["b"] = longer = FakeInstance("b")
    await longer.start()
    longer.info = replace(longer.info, max_model_len=2 * MAX_MODEL_LEN)
    await fakes.register()
    await fakes.until(lambda: len(fakes.cluster.usable().get(Pool.MIX, ())) == 2)
    assert fakes.cluster.max_model_len() == 2 * MAX_MODEL_LEN
    await fakes.register("a")
    assert fakes.cluster.max_model_len() == MAX_MODEL_LEN
    await fakes.cluster.update(())
    assert fakes.cluster.max_model_len() is None


async def test_without_weights_of_its_own_all_are_taken():
    cluster = Cluster()
    try:
        found = await members_of(cluster, instance("a", "1", weights_key="w"), instance("b", "2", weights_key="x"))
        assert found == {"a", "b"}
    finally:
        await cluster.close()
