"""Which instances there are and whether they answer: one pure function from event to event.

Events come from three sides: the registry, health probes, and the loads that instances report. The registry's are in
one order, by revision: what is not newer than what was seen changes nothing. The others name an incarnation, and change
nothing when it is not the one that is registered.

    registered, it answers               ACTIVE      gets work
    gone from the registry, it answers   LEASE_LOST  gets work; unheard for heartbeat_timeout_s: SUSPECT
    it does not answer, or not SERVING   SUSPECT     no work; gone from the registry and silent for removal_s: removed

An instance that drains unregisters, answers NOT_SERVING while it finishes its work, and is removed as soon as it does
not answer any more.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType

from xllm_compile.scheduler.cluster.state import Health, InstanceInfo

View = tuple[tuple[InstanceInfo, Health], ...]
"""The instances by name."""


class Answer(StrEnum):
    """Of an instance to a health probe."""

    SERVING = "serving"
    NOT_SERVING = "not_serving"
    """It drains, or its engine is gone."""
    NONE = "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class LivenessConfig:
    heartbeat_timeout_s: float = 3.0
    """An instance unheard for so long is probed; outside the registry it is SUSPECT then."""
    probe_period_s: float = 1.0
    """Between probes of an instance that is not ACTIVE."""
    removal_s: float = 15.0
    """A SUSPECT instance outside the registry is forgotten when it was not heard for so long."""

    def __post_init__(self) -> None:
        for name in ("heartbeat_timeout_s", "probe_period_s", "removal_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    info: InstanceInfo
    is_registered: bool
    answer: Answer = Answer.SERVING
    """The last one, as far as nothing else has shown since that it lives."""
    heard_s: float
    """When it last showed life: by registering, a heartbeat, or an answer."""

    @property
    def health(self) -> Health:
        if self.answer is not Answer.SERVING:
            return Health.SUSPECT
        return Health.ACTIVE if self.is_registered else Health.LEASE_LOST


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    members: Mapping[str, Member] = field(default_factory=lambda: MappingProxyType({}))
    revision: int = 0
    """Of the registry, as far as it was seen."""

    @property
    def view(self) -> View:
        return tuple((member.info, member.health) for _, member in sorted(self.members.items()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Registered:
    """A put. It may repeat what is known."""

    info: InstanceInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class Unregistered:
    """A delete, or a value that cannot be read."""

    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RegistryChanged:
    """Changes in order, the last of them of this revision."""

    changes: tuple[tuple[int, Registered | Unregistered], ...]
    """Each with its revision."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RegistryListed:
    """All that was registered at this revision."""

    infos: tuple[InstanceInfo, ...]
    revision: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Probed:
    name: str
    incarnation: str
    answer: Answer


@dataclass(frozen=True, kw_only=True, slots=True)
class Heard:
    """A heartbeat: it reported its load."""

    name: str
    incarnation: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TimePassed:
    pass


Event = RegistryChanged | RegistryListed | Probed | Heard | TimePassed


def reduce(table: Table, event: Event, now_s: float, config: LivenessConfig) -> Table:
    """The table after the event. now_s is of any clock that does not go back."""
    match event:
        case RegistryChanged(changes=changes):
            return _changed(table, changes, now_s)
        case RegistryListed(infos=infos, revision=revision):
            return _listed(table, infos, revision, now_s)
        case Probed(name=name, incarnation=incarnation, answer=answer):
            member = _current(table, name, incarnation)
            return table if member is None else _probed(table, member, answer, now_s)
        case Heard(name=name, incarnation=incarnation):
            member = _current(table, name, incarnation)
            return table if member is None else _heard(table, member, now_s)
        case TimePassed():
            return _time_passed(table, now_s, config)


def due_probes(table: Table, now_s: float, config: LivenessConfig) -> tuple[InstanceInfo, ...]:
    """Whom to probe now: all that are not ACTIVE, and those that were not heard for long."""
    return tuple(
        member.info
        for member in table.members.values()
        if member.health is not Health.ACTIVE or now_s - member.heard_s >= config.heartbeat_timeout_s
    )


def _changed(table: Table, changes: Iterable[tuple[int, Registered | Unregistered]], now_s: float) -> Table:
    seen, members = table.revision, dict(table.members)
    revision = seen
    for at, change in changes:
        if at <= seen:
            continue
        revision = max(revision, at)
        match change:
            case Registered(info=info):
                members[info.name] = _new(info, now_s)
            case Unregistered(name=name):
                if name in members:
                    members[name] = replace(members[name], is_registered=False)
    return table if revision == seen else Table(members=MappingProxyType(members), revision=revision)


def _listed(table: Table, infos: tuple[InstanceInfo, ...], revision: int, now_s: float) -> Table:
    if revision < table.revision:
        return table
    listed = {info.name: info for info in infos}
    members = {}
    for name, info in listed.items():
        member = table.members.get(name)
        # A member that was known stays as its answers made it; one that came back by a put unseen so far is alive.
        is_same = member is not None and member.info == info and member.is_registered
        members[name] = member if member is not None and is_same else _new(info, now_s)
    for name, member in table.members.items():
        if name not in listed:
            members[name] = replace(member, is_registered=False)
    if members == table.members:
        return table if revision == table.revision else replace(table, revision=revision)
    return Table(members=MappingProxyType(members), revision=revision)


def _heard(table: Table, member: Member, now_s: float) -> Table:
    # A process whose engine is gone still reports its load.
    answer = Answer.NOT_SERVING if member.answer is Answer.NOT_SERVING else Answer.SERVING
    return _with(table, replace(member, answer=answer, heard_s=now_s))


def _probed(table: Table, member: Member, answer: Answer, now_s: float) -> Table:
    if answer is not Answer.NONE:
        return _with(table, replace(member, answer=answer, heard_s=now_s))
    if member.answer is Answer.NOT_SERVING and not member.is_registered:
        # It has said that it leaves.
        return _without(table, member.info.name)
    return _with(table, replace(member, answer=answer))


def _time_passed(table: Table, now_s: float, config: LivenessConfig) -> Table:
    for member in tuple(table.members.values()):
        unheard_s = now_s - member.heard_s
        if member.is_registered:
            continue
        if member.health is Health.SUSPECT and unheard_s >= config.removal_s:
            table = _without(table, member.info.name)
        elif member.health is Health.LEASE_LOST and unheard_s >= config.heartbeat_timeout_s:
            table = _with(table, replace(member, answer=Answer.NONE))
    return table


def _new(info: InstanceInfo, now_s: float) -> Member:
    return Member(info=info, is_registered=True, heard_s=now_s)


def _current(table: Table, name: str, incarnation: str) -> Member | None:
    member = table.members.get(name)
    return member if member is not None and member.info.incarnation == incarnation else None


def _with(table: Table, member: Member) -> Table:
    return replace(table, members=MappingProxyType({**table.members, member.info.name: member}))


def _without(table: Table, name: str) -> Table:
    return replace(table, members=MappingProxyType({n: m for n, m in table.members.items() if n != name}))
