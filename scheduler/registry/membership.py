"""The gateway's side of the registry: the instances there are, kept up to date by watching, listing and probing.

What an event means is decided in liveness.py; here is what brings the events.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from xllm_compile.scheduler.cluster.state import InstanceInfo
from xllm_compile.scheduler.registry import instance_record
from xllm_compile.scheduler.registry.liveness import (
    Event,
    Heard,
    LivenessConfig,
    Probed,
    Registered,
    RegistryChanged,
    RegistryListed,
    Table,
    TimePassed,
    Unregistered,
    View,
    due_probes,
    reduce,
)
from xllm_compile.scheduler.registry.probe import Probe, probe_health
from xllm_compile.scheduler.registry.registry import (
    Change,
    CompactedError,
    Entry,
    Registry,
    RegistryError,
)
from xllm_compile.scheduler.tasks import cancel_all

logger = logging.getLogger(__name__)

_RETRY_S = 1.0
_RECONCILE_S = 5.0
"""Between listings: what a watch should have told, and did not."""


class Membership:
    """Follows the registry while entered. Of one event loop."""

    def __init__(
        self,
        registry: Registry,
        *,
        namespace: str = "",
        config: LivenessConfig | None = None,
        probe: Probe = probe_health,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._prefix = namespace + instance_record.PREFIX
        self._config = config or LivenessConfig()
        self._probe = probe
        self._clock = clock
        self._table = Table()
        self._view: View = ()
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        # By (name, incarnation); one at a time each.
        self._probes: dict[tuple[str, str], asyncio.Task[None]] = {}
        # Keys whose value could not be read, with its revision: said once.
        self._unreadable: dict[str, int] = {}

    @property
    def view(self) -> View:
        """The instances by name, each with its health. Another object after every change, and the same without one."""
        return self._view

    async def wait_for_change(self, seen: View) -> View:
        """The view as soon as it is another one than `seen`."""
        while self._view is seen:
            await self._changed.wait()
        return self._view

    def heard(self, name: str, incarnation: str) -> None:
        """The instance has reported its load."""
        self._apply(Heard(name=name, incarnation=incarnation))

    def doubt(self, name: str, incarnation: str) -> None:
        """A call to the instance failed: probe it now."""
        member = self._table.members.get(name)
        if member is not None and member.info.incarnation == incarnation:
            self._start_probe(member.info)

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(run()) for run in (self._follow, self._reconcile, self._tick)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await cancel_all([*self._tasks, *self._probes.values()])

    async def _follow(self) -> None:
        is_warned = False
        while True:
            try:
                revision = await self._list()
                is_warned = False
                async for batch in self._registry.watch(self._prefix, revision):
                    self._apply(RegistryChanged(changes=tuple((c.revision, self._change(c)) for c in batch)))
                    self._probe_due()
            except CompactedError as err:
                logger.info("listing the instances again: %s", err)
            except RegistryError as err:
                # Instances that are known stay: they are judged by their answers.
                if not is_warned:
                    logger.warning("cannot see new instances: %s", err)
                    is_warned = True
                await asyncio.sleep(_RETRY_S)

    async def _reconcile(self) -> None:
        while True:
            await asyncio.sleep(_RECONCILE_S)
            try:
                await self._list()
            except RegistryError as err:
                logger.debug("listing the instances: %s", err)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._config.probe_period_s)
            self._apply(TimePassed())
            self._probe_due()

    async def _list(self) -> int:
        snapshot = await self._registry.snapshot(self._prefix)
        infos = [self._read(entry) for entry in snapshot.entries]
        keys = {entry.key for entry in snapshot.entries}
        self._unreadable = {key: revision for key, revision in self._unreadable.items() if key in keys}
        readable = tuple(info for info in infos if info is not None)
        self._apply(RegistryListed(infos=readable, revision=snapshot.revision))
        self._probe_due()
        return snapshot.revision

    def _change(self, change: Change) -> Registered | Unregistered:
        info = self._read(change.entry) if change.entry is not None else None
        return Registered(info=info) if info is not None else Unregistered(name=change.key.removeprefix(self._prefix))

    def _read(self, entry: Entry) -> InstanceInfo | None:
        """None, and a warning, for a value that is no instance."""
        try:
            info = instance_record.from_json(entry.value)
            if self._prefix + info.name != entry.key:
                raise ValueError(f"name={info.name!r} is not the key's")
        except ValueError as err:
            if self._unreadable.get(entry.key) != entry.revision:
                self._unreadable[entry.key] = entry.revision
                logger.warning("registry key %s holds no instance and is left out: %s", entry.key, err)
            return None
        return info

    def _probe_due(self) -> None:
        for info in due_probes(self._table, self._clock(), self._config):
            self._start_probe(info)

    def _start_probe(self, info: InstanceInfo) -> None:
        key = (info.name, info.incarnation)
        if key not in self._probes:
            self._probes[key] = asyncio.create_task(self._run_probe(info))
            self._probes[key].add_done_callback(lambda _: self._probes.pop(key, None))

    async def _run_probe(self, info: InstanceInfo) -> None:
        answer = await self._probe(info)
        self._apply(Probed(name=info.name, incarnation=info.incarnation, answer=answer))

    def _apply(self, event: Event) -> None:
        self._table = reduce(self._table, event, self._clock(), self._config)
        view = self._table.view
        if view == self._view:
            return
        for line in _differences(self._view, view):
            logger.info("%s", line)
        self._view = view
        self._changed.set()
        self._changed = asyncio.Event()


def _differences(before: View, after: View) -> list[str]:
    """What to log: every instance that came, went, was replaced or changed its health."""
    old, new = ({(info.name, info.incarnation): (info, health) for info, health in view} for view in (before, after))
    lines = [f"instance {name} ({incarnation}) is gone" for name, incarnation in old if (name, incarnation) not in new]
    for key, (info, health) in new.items():
        if key not in old:
            lines.append(f"instance {info.name} ({info.incarnation}) at {info.address}: {info.role}, {health}")
        elif old[key][1] is not health:
            lines.append(f"instance {info.name} ({info.incarnation}): {old[key][1]} -> {health}")
    return lines
