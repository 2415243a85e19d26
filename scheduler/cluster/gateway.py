"""What a gateway keeps up beside its servers: the registry, or a connection to it, and its view of the instances."""

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

from xllm_compile.scheduler.cluster.cluster import Cluster
from xllm_compile.scheduler.cluster.registry_address import SERVED_USER, RegistryAddress
from xllm_compile.scheduler.cluster.role_keeper import RoleKeeper, follow_pools
from xllm_compile.scheduler.policies.roles import RoleRules
from xllm_compile.scheduler.registry.election import LEADER_KEY, stand
from xllm_compile.scheduler.registry.etcd_registry import EtcdRegistry
from xllm_compile.scheduler.registry.membership import Membership
from xllm_compile.scheduler.registry.probe import probe_health
from xllm_compile.scheduler.registry.registry import Registry
from xllm_compile.scheduler.registry.registry_server import RegistryServer, served_registry
from xllm_compile.scheduler.tasks import cancel_all
from xllm_compile.scheduler.tls import TlsConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedRegistry:
    """A registry of the gateway's own, for its instances."""

    host: str
    port: int
    """0 lets the system choose."""


class Gateway:
    """Up while entered."""

    def __init__(
        self,
        registry: RegistryAddress | ServedRegistry,
        *,
        name: str,
        api_keys: Sequence[str] = (),
        tls: TlsConfig | None = None,
        roles: RoleRules | None = None,
        weights_key: str | None = None,
    ) -> None:
        """name: of this gateway among others. api_keys: instances need one for the served registry, and are sent the
        first. tls: with a CA, TLS to both. roles: change what instances do as the load changes; None leaves them what
        they were started for. weights_key: see Cluster."""
        self._registry = registry
        self._name = name
        self._roles = roles
        self._api_keys = api_keys
        tls = tls or TlsConfig()
        # The links' TLS and the registry's go together: instances speak to the one and answer the other.
        self._served_credentials = tls.server_credentials() if tls.ca_file is not None else None
        self._credentials = tls.channel_credentials()
        self._stack = AsyncExitStack()
        self.cluster = Cluster(
            api_key=next(iter(api_keys), None), credentials=self._credentials, weights_key=weights_key
        )
        self.registry_port = 0
        """Of the served registry, once it is up."""

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            probe = partial(probe_health, credentials=self._credentials)
            registry, namespace = await self._open_registry(stack)
            membership = await stack.enter_async_context(Membership(registry, namespace=namespace, probe=probe))
            self.cluster.listen(membership)
            stack.push_async_callback(self.cluster.close)
            jobs: list[Coroutine[Any, Any, None]] = [
                self._follow(membership),
                follow_pools(self.cluster, registry, namespace=namespace),
            ]
            if self._roles is not None:
                keeper = RoleKeeper(self.cluster, registry, self._roles, namespace=namespace)
                jobs.append(stand(registry, namespace + LEADER_KEY, self._name, keeper.lead))
            stack.push_async_callback(cancel_all, [asyncio.create_task(job) for job in jobs])
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _open_registry(self, stack: AsyncExitStack) -> tuple[Registry, str]:
        if isinstance(self._registry, RegistryAddress):
            return await stack.enter_async_context(EtcdRegistry(self._registry.config)), self._registry.namespace
        registry = served_registry()
        user = SERVED_USER if self._api_keys else ""
        server = RegistryServer(registry, user=user, passwords=self._api_keys, credentials=self._served_credentials)
        self.registry_port = await server.start(self._registry.host, self._registry.port)
        stack.push_async_callback(server.stop)
        return registry, ""

    async def _follow(self, membership: Membership) -> None:
        view = membership.view
        while True:
            await self.cluster.update(view)
            view = await membership.wait_for_change(view)
