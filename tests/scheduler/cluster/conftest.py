from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from tests.scheduler.cluster.cluster_fixtures import FakeCluster, FakeInstance
from xllm_compile.scheduler.cluster.attempts import FailoverConfig


@pytest.fixture
async def make_cluster() -> AsyncIterator[Callable[..., Awaitable[FakeCluster]]]:
    """make_cluster(a={}, b={"max_waiting": 1}, failover=...): started instances of these names and engine options."""
    made: list[FakeCluster] = []

    async def make(failover: FailoverConfig | None = None, **options: dict[str, Any]) -> FakeCluster:
        instances = {name: FakeInstance(name, **given) for name, given in options.items()}
        cluster = FakeCluster(instances, failover or FailoverConfig(wait_s=10))
        made.append(cluster)
        await cluster.start()
        return cluster

    yield make
    for cluster in made:
        await cluster.close()
