"""The instances of a service as one gateway sees them: who is a member, how each fares, and a link to each."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

import grpc

from xllm_compile.scheduler.cluster.instance_link import InstanceLink
from xllm_compile.scheduler.cluster.kv_index import KVIndex
from xllm_compile.scheduler.cluster.state import Health, Instance, InstanceInfo, Pool, Role
from xllm_compile.scheduler.cluster.stats import ClusterStats

logger = logging.getLogger(__name__)

_POOLS = {Role.MIX: Pool.MIX, Role.PREFILL: Pool.PREFILL, Role.DECODE: Pool.DECODE}


class Listener(Protocol):
    """Who decides on liveness (registry/membership.py), told by name and incarnation."""

    def heard(self, name: str, incarnation: str) -> None:
        """It has reported its load."""

    def doubt(self, name: str, incarnation: str) -> None:
        """A call to it failed."""


class Cluster:
    """Belongs to one event loop."""

    def __init__(
        self,
        *,
        api_key: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        weights_key: str | None = None,
    ) -> None:
        """api_key is what the instances ask for. Without credentials they speak no TLS. weights_key: of what is served
        here; instances that say another one are none of these. None takes all."""
        self._api_key = api_key
        self._weights_key = weights_key
        self._strangers: set[str] = set()
        """Incarnations of those others, which are named once."""
        self._credentials = credentials
        self._listener: Listener | None = None
        self.stats = ClusterStats()
        self.kv = KVIndex()
        """Which instances have the KV of which blocks."""
        self._links: dict[str, InstanceLink] = {}
        self._health: dict[str, Health] = {}
        self._pools: dict[str, Pool] = {}
        self._changed = asyncio.Event()
        self._usable: dict[Pool, list[str]] | None = None
        self._longest: int | None = None
        """Likewise; see max_model_len."""
        self._states: dict[str, tuple[bool, bool]] = {}
        """By name what of an instance's reports decides whether it is usable."""
        self.on_gone: Callable[[InstanceInfo], None] = lambda info: None
        """Called when an instance is no member any more."""

    def listen(self, listener: Listener) -> None:
        """Have it told what the links notice."""
        self._listener = listener

    async def update(self, members: Iterable[tuple[InstanceInfo, Health]]) -> None:
        """Take over who the registry says is there. A name with a new incarnation is another instance."""
        known = {info.name: (info, health) for info, health in self._ours(members)}
        for name, link in list(self._links.items()):
            if name not in known or known[name][0].incarnation != link.info.incarnation:
                del self._links[name]
                self._usable = None
                await link.close()
                self._states.pop(name, None)
                self.on_gone(link.info)
        for name, (info, health) in known.items():
            self._health[name] = health
            self._usable = None
            if name not in self._links:
                self._links[name] = link = self._make_link(info)
                await link.start()
        self.notify()

    def _ours(self, members: Iterable[tuple[InstanceInfo, Health]]) -> Iterator[tuple[InstanceInfo, Health]]:
        """Without those of another model: a request must not go on with other weights, nor text be another's tokens."""
        strangers: set[str] = set()
        for info, health in members:
            if self._weights_key is None or info.weights_key in ("", self._weights_key):
                yield info, health
                continue
            strangers.add(info.incarnation)
            if info.incarnation not in self._strangers:
                logger.warning(
                    "instance %s (%s) gets no work: its weights are not those of this gateway's artifact; serve both "
                    "from the same one",
                    info.name,
                    ", ".join(info.model_names),
                )
        self._strangers = strangers

    def _make_link(self, info: InstanceInfo) -> InstanceLink:
        kv: KVIndex | None = self.kv
        if info.block_tokens != self.kv.block_tokens:
            logger.warning(
                "instance %s has KV blocks of %d tokens, others of %d; its prefixes are not counted on",
                info.name,
                info.block_tokens,
                self.kv.block_tokens,
            )
            kv = None
        return InstanceLink(
            info, api_key=self._api_key, credentials=self._credentials, kv=kv, on_report=self._note_report
        )

    def set_pools(self, pools: Mapping[str, Pool]) -> None:
        """What instances do now, by name; of those without, their role says."""
        self._pools = dict(pools)
        self._usable = None
        self.notify()

    async def close(self) -> None:
        await self.update(())

    def doubt(self, link: InstanceLink) -> None:
        """A request lost it."""
        if self._listener is not None:
            self._listener.doubt(link.info.name, link.info.incarnation)

    def link(self, name: str) -> InstanceLink | None:
        return self._links.get(name)

    def instances(self) -> tuple[Instance, ...]:
        """As of now. One that does not report is SUSPECT, whatever the registry says."""
        return tuple(map(self._instance, self._links.values()))

    def find(self, name: str) -> Instance | None:
        """As of now."""
        link = self._links.get(name)
        return None if link is None else self._instance(link)

    def _instance(self, link: InstanceLink) -> Instance:
        name = link.info.name
        return Instance(
            info=link.info,
            health=self._health[name] if link.is_up else Health.SUSPECT,
            pool=self._pools.get(name, _POOLS.get(link.info.role, Pool.MIX)),
            load=link.load,
            load_age_s=time.monotonic() - link.reported_s,
        )

    def usable(self) -> Mapping[Pool, Sequence[str]]:
        """Names of those that take work, by pool."""
        # Made anew where that changes, not for each request: there may be thousands.
        if self._usable is None:
            self._usable = {}
            takers = [instance for instance in self.instances() if instance.takes_work]
            for instance in takers:
                self._usable.setdefault(instance.pool, []).append(instance.name)
            self._longest = max((instance.info.max_model_len for instance in takers), default=None)
        return self._usable

    def max_model_len(self) -> int | None:
        """Prompt and output tokens that some instance takes; None where none takes work."""
        self.usable()
        return self._longest

    @property
    def is_ready(self) -> bool:
        """Whether some instance takes work: any can both prefill and decode."""
        return bool(self.usable())

    async def wait_changed(self, timeout_s: float) -> None:
        """Until something changed since the call, or the time is over."""
        changed = self._changed
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await changed.wait()

    def _note_report(self, link: InstanceLink) -> None:
        state = link.is_up, link.load.is_draining
        if self._states.get(link.info.name) != state:
            self._states[link.info.name] = state
            self._usable = None
        if not link.is_up:
            self.doubt(link)
        elif self._listener is not None:
            self._listener.heard(link.info.name, link.info.incarnation)
        self.notify()

    def notify(self) -> None:
        """Wake those in `wait_changed`."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
