"""GET /cluster: the instances as the gateway sees them, for people and for the dashboard."""

import json
from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from xllm_compile.scheduler.cluster.cluster import Cluster
from xllm_compile.scheduler.cluster.state import Instance


class ClusterApi:
    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def routes(self) -> list[Route]:
        return [Route("/cluster", self.show, methods=["GET"])]

    async def show(self, request: Request) -> Response:
        content = {
            "instances": [_instance(each) for each in self._cluster.instances()],
            "counts": asdict(self._cluster.stats),
        }
        return Response(json.dumps(content), media_type="application/json")


def _instance(instance: Instance) -> dict[str, Any]:
    load = asdict(instance.load)
    # Hundreds of numbers that say nothing to people.
    del load["profile"]
    return {
        "name": instance.name,
        "incarnation": instance.info.incarnation,
        "role": instance.info.role,
        "pool": instance.pool,
        "health": instance.health,
        "address": instance.info.address,
        "version": instance.info.version,
        "kv_tokens_total": instance.info.kv_tokens_total,
        "max_num_seqs": instance.info.max_num_seqs,
        "report_age_s": instance.load_age_s,
        "load": load,
    }
