"""What a gateway keeps up beside its servers: the registry, or a connection to it, and its view of the instances."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from xllm_compile.scheduler.cluster.cluster import Cluster
from xllm_compile.scheduler.cluster.registry_address import SERVED_USER, RegistryAddress
from xllm_compile.scheduler.registry.etcd_registry import EtcdRegistry
from xllm_compile.scheduler.registry.membership import Membership
from xllm_compile.scheduler.registry.registry import Registry
from xllm_compile.scheduler.registry.registry_server import RegistryServer, served_registry
from xllm_compile.scheduler.tasks import cancel_all


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedRegistry:
    """A registry of the gateway's own, for its instances."""

    host: str
    port: int
    """0 lets the system choose."""


class Gateway:
    """Up while entered."""

    def __init__(self, registry: RegistryAddress | ServedRegistry, *, api_key: str | None = None) -> None:
        """api_key: what instances ask for, and what they need for the served registry."""
        self._registry = registry
        self._api_key = api_key
        self._stack = AsyncExitStack()
        self.cluster = Cluster(api_key=api_key)
        self.registry_port = 0
        """Of the served registry, once it is up."""

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            registry, namespace = await self._open_registry(stack)
            membership = await stack.enter_async_context(Membership(registry, namespace=namespace))
            self.cluster.listen(membership)
            stack.push_async_callback(self.cluster.close)
            following = asyncio.create_task(self._follow(membership))
            stack.push_async_callback(cancel_all, [following])
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
        user = SERVED_USER if self._api_key else ""
        server = RegistryServer(registry, user=user, password=self._api_key or "")
        self.registry_port = await server.start(self._registry.host, self._registry.port)
        stack.push_async_callback(server.stop)
        return registry, ""

    async def _follow(self, membership: Membership) -> None:
        view = membership.view
        while True:
            await self.cluster.update(view)
            view = await membership.wait_for_change(view)
