"""Has instances with slack take offline sequences over from others (policies/colocation.py).

Each gateway moves its own requests, and none leads: two that see the same slack ask for the same room, and the instance
gives it once (`Reserve`). What it took it computes only as far as its online requests' targets leave time
(`runtime/local_scheduler.py`), so a gateway that is wrong costs no online token.
"""

import asyncio

from xllm_compile.scheduler.cluster.cluster import Cluster
from xllm_compile.scheduler.cluster.cluster_client import ClusterClient
from xllm_compile.scheduler.cluster.completion import Completion
from xllm_compile.scheduler.cluster.placer import Placer
from xllm_compile.scheduler.policies.colocation import ColocationRules, pulls


class OfflinePuller:
    """Belongs to the client's event loop."""

    def __init__(self, cluster: Cluster, client: ClusterClient, placer: Placer, rules: ColocationRules) -> None:
        """placer is the client's."""
        self._cluster = cluster
        self._client = client
        self._placer = placer
        self._rules = rules

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self.pull()
            await asyncio.sleep(self._rules.period_s)

    async def pull(self) -> None:
        """Once; returns when all that move have a place, or were refused one."""
        movable: dict[str, Completion] = {}
        lengths: dict[str, dict[str, int]] = {}
        for number, completion in enumerate(self._client.completions()):
            name = completion.offline_at
            if name is not None:
                movable[str(number)] = completion
                lengths.setdefault(name, {})[str(number)] = completion.num_tokens
        if not movable:
            return
        moves = []
        for key, target in pulls(self._placer.loaded(self._cluster.instances()), lengths, self._rules):
            link = self._cluster.link(target)
            if link is not None:
                moves.append(movable[key].move(link))
        await asyncio.gather(*moves)
