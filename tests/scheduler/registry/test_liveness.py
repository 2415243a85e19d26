"""The reducer: each rule of the state machine, and what must hold whatever comes in whatever order."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scheduler.registry.instances import instance
from xllm_compile.scheduler.cluster.state import Health, InstanceInfo
from xllm_compile.scheduler.registry.liveness import (
    Answer,
    Heard,
    LivenessConfig,
    Probed,
    Registered,
    RegistryChanged,
    RegistryListed,
    Table,
    TimePassed,
    Unregistered,
    due_probes,
    reduce,
)

CONFIG = LivenessConfig()
A1, A2 = instance("a", "1"), instance("a", "2")
SERVING, NOT_SERVING, NONE = (Probed(name="a", incarnation="1", answer=answer) for answer in Answer)
HEARD = Heard(name="a", incarnation="1")
NONE_OF_2 = Probed(name="a", incarnation="2", answer=Answer.NONE)


def put(info, revision):
    return RegistryChanged(changes=((revision, Registered(info=info)),))


def deleted(name, revision):
    return RegistryChanged(changes=((revision, Unregistered(name=name)),))


def listed(revision, *infos):
    return RegistryListed(infos=infos, revision=revision)


def run(*events, table=None, config=CONFIG):
    """Numbers are seconds that pass before the next event."""
    table, now_s = table or Table(), 0.0
    for event in events:
        if isinstance(event, int | float):
            now_s += event
        else:
            table = reduce(table, event, now_s, config)
    return table


def view(*events):
    return [(info.incarnation, health.value) for info, health in run(*events).view]


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([put(A1, 1)], [("1", "active")]),
        ([listed(1, A1)], [("1", "active")]),
        # Gone from the registry: it gets work while it answers.
        ([put(A1, 1), deleted("a", 2)], [("1", "lease_lost")]),
        ([listed(1, A1), listed(2)], [("1", "lease_lost")]),
        ([put(A1, 1), deleted("a", 2), SERVING, 2.9, TimePassed()], [("1", "lease_lost")]),
        ([put(A1, 1), deleted("a", 2), NONE], [("1", "suspect")]),
        ([put(A1, 1), deleted("a", 2), 3, TimePassed()], [("1", "suspect")]),
        ([put(A1, 1), deleted("a", 2), 2, HEARD, 2, TimePassed()], [("1", "lease_lost")]),
        # It drains, for as long as it takes, and then it is gone.
        ([put(A1, 1), deleted("a", 2), NOT_SERVING], [("1", "suspect")]),
        ([put(A1, 1), NOT_SERVING, deleted("a", 2), HEARD], [("1", "suspect")]),
        ([put(A1, 1), deleted("a", 2), 14, NOT_SERVING, 14, TimePassed(), HEARD, 14, TimePassed()], [("1", "suspect")]),
        ([put(A1, 1), deleted("a", 2), NOT_SERVING, NONE], []),
        # Back from SUSPECT.
        ([put(A1, 1), deleted("a", 2), NONE, HEARD], [("1", "lease_lost")]),
        ([put(A1, 1), deleted("a", 2), NONE, SERVING], [("1", "lease_lost")]),
        ([put(A1, 1), deleted("a", 2), NONE, put(A1, 3)], [("1", "active")]),
        ([put(A1, 1), deleted("a", 2), listed(3, A1)], [("1", "active")]),
        # Registered, but it does not answer: only an answer brings it back.
        ([put(A1, 1), NONE], [("1", "suspect")]),
        ([put(A1, 1), NONE, listed(5, A1)], [("1", "suspect")]),
        ([put(A1, 1), NONE, 100, TimePassed()], [("1", "suspect")]),
        ([put(A1, 1), NONE, HEARD], [("1", "active")]),
        # Its engine is gone: its heartbeats do not hide that.
        ([put(A1, 1), NOT_SERVING, HEARD], [("1", "suspect")]),
        ([put(A1, 1), NOT_SERVING, NONE], [("1", "suspect")]),
        ([put(A1, 1), NOT_SERVING, SERVING], [("1", "active")]),
        # Forgotten 15 s after the last sign of life.
        ([put(A1, 1), deleted("a", 2), NONE, 14.9, TimePassed()], [("1", "suspect")]),
        ([put(A1, 1), deleted("a", 2), NONE, 15, TimePassed()], []),
        ([put(A1, 1), deleted("a", 2), 10, NONE, 5, TimePassed()], []),
        # A restart under the same name.
        ([put(A1, 1), put(A2, 2)], [("2", "active")]),
        ([put(A1, 1), deleted("a", 2), NONE, put(A2, 3)], [("2", "active")]),
        ([listed(1, A1), listed(2, A2)], [("2", "active")]),
        # What is stale changes nothing.
        ([put(A1, 1), put(A2, 3), deleted("a", 2)], [("2", "active")]),
        ([put(A2, 3), put(A1, 1)], [("2", "active")]),
        ([put(A2, 3), listed(2, A1)], [("2", "active")]),
        ([put(A2, 3), listed(2)], [("2", "active")]),
        ([put(A1, 1), put(A2, 2), NONE], [("2", "active")]),
        ([put(A1, 1), put(A2, 2), NOT_SERVING], [("2", "active")]),
        ([put(A2, 2), deleted("a", 3), NONE_OF_2, HEARD], [("2", "suspect")]),
        ([put(A1, 1), deleted("a", 2), NOT_SERVING, NONE, put(A1, 1), listed(1, A1), HEARD, SERVING], []),
        ([HEARD, SERVING, NONE, deleted("a", 1), TimePassed()], []),
    ],
)  # fmt: skip
def test_the_state_machine(events, expected):
    assert view(*events) == expected


def test_all_changes_of_a_revision_count():
    batch = RegistryChanged(changes=((4, Unregistered(name="a")), (4, Unregistered(name="b"))))
    table = run(put(A1, 2), put(instance("b"), 3), batch)
    assert [health for _, health in table.view] == [Health.LEASE_LOST] * 2
    assert table.revision == 4


def test_of_a_batch_that_is_partly_known_the_rest_counts():
    b = instance("b")
    batch = RegistryChanged(changes=((1, Registered(info=A1)), (2, Registered(info=b))))
    assert run(put(A1, 1), NONE, batch).view == ((A1, Health.SUSPECT), (b, Health.ACTIVE))


def test_nothing_new_is_the_same_table():
    table = run(put(A1, 1), deleted("a", 2))
    for event in (put(A1, 1), deleted("a", 2), listed(1, A1), listed(2), TimePassed()):
        assert reduce(table, event, 0.0, CONFIG) is table


def test_who_is_probed():
    assert due_probes(run(put(A1, 1)), 2.9, CONFIG) == ()
    assert due_probes(run(put(A1, 1)), 3.0, CONFIG) == (A1,)
    assert due_probes(run(put(A1, 1), 2, HEARD), 3.0, CONFIG) == ()
    assert due_probes(run(put(A1, 1), deleted("a", 2)), 0.0, CONFIG) == (A1,)
    assert due_probes(run(put(A1, 1), NONE), 0.0, CONFIG) == (A1,)


@pytest.mark.parametrize("name", ["heartbeat_timeout_s", "probe_period_s", "removal_s"])
def test_times_are_above_zero(name):
    with pytest.raises(ValueError, match=f"{name}=0 must be above 0"):
        LivenessConfig(**{name: 0})


@st.composite
def histories(draw):
    """A registry's history, and events in any order: batches of its changes, again and again, listings, and others.

    A process registers under a name never again once another incarnation has.
    """
    names = ("a", "b")
    changes: list[tuple[int, Registered | Unregistered]] = []
    snapshots: list[tuple[InstanceInfo, ...]] = [()]
    incarnation, registered = dict.fromkeys(names, 0), set()
    for revision in range(1, draw(st.integers(1, 12)) + 1):
        name = draw(st.sampled_from(names))
        if name in registered and draw(st.booleans()):
            registered.discard(name)
            changes.append((revision, Unregistered(name=name)))
        else:
            if not incarnation[name] or draw(st.booleans()):
                incarnation[name] += 1
            registered.add(name)
            changes.append((revision, Registered(info=instance(name, str(incarnation[name])))))
        snapshots.append(tuple(instance(name, str(incarnation[name])) for name in sorted(registered)))
    places = st.integers(0, len(changes) - 1)
    someone = st.tuples(st.sampled_from(names), st.integers(1, 4).map(str))
    event = st.one_of(
        st.tuples(places, places).map(lambda at: RegistryChanged(changes=tuple(changes[min(at) : max(at) + 1]))),
        st.integers(0, len(changes)).map(lambda at: RegistryListed(infos=snapshots[at], revision=at)),
        st.tuples(someone, st.sampled_from(Answer)).map(
            lambda it: Probed(name=it[0][0], incarnation=it[0][1], answer=it[1])
        ),
        someone.map(lambda it: Heard(name=it[0], incarnation=it[1])),
        st.just(TimePassed()),
    )
    return changes, draw(st.lists(st.tuples(event, st.floats(0, 8)), max_size=40))


def newest_seen(changes, events):
    """Of each name the incarnation that the registry's newest word on it among the events, or before it, names."""
    revision = 0
    for event, _ in events:
        if isinstance(event, RegistryListed):
            revision = max(revision, event.revision)
        elif isinstance(event, RegistryChanged):
            revision = max(revision, event.changes[-1][0])
    return {c.info.name: c.info.incarnation for at, c in changes if at <= revision and isinstance(c, Registered)}


@settings(max_examples=300)
@given(histories())
def test_no_old_incarnation_comes_back(history):
    changes, events = history
    table, now_s = Table(), 0.0
    # (name, incarnation) of those that were replaced or removed, with the revision at which that was known.
    retired: dict[tuple[str, str], int] = {}
    for at, (event, seconds) in enumerate(events):
        now_s += seconds
        before, table = table, reduce(table, event, now_s, CONFIG)
        assert table.revision >= before.revision
        newest = newest_seen(changes, events[: at + 1])
        for name, member in table.members.items():
            key = (name, member.info.incarnation)
            # An event names it newer than all that is known, or nothing does.
            assert int(member.info.incarnation) <= int(newest[name])
            assert key not in retired or _registered_after(changes, key, retired[key], table.revision), key
            retired.pop(key, None)
        for name, member in before.members.items():
            old = member.info.incarnation
            now = table.members.get(name)
            if now is None or now.info.incarnation != old:
                retired[name, old] = table.revision
            elif member.health is Health.SUSPECT and now.health is not Health.SUSPECT:
                # Only its own sign of life, or its own new registration, brings it back.
                assert _speaks_for(event, name, old, before.revision), event
        for name, member in table.members.items():
            for other, incarnation in retired:
                assert (name, member.info.incarnation) != (other, incarnation)


def _registered_after(changes, key, revision, until):
    """Whether the very incarnation registered anew after that revision."""
    return any(
        revision < at <= until and isinstance(c, Registered) and (c.info.name, c.info.incarnation) == key
        for at, c in changes
    )


def _speaks_for(event, name, incarnation, seen):
    match event:
        case RegistryListed(infos=infos, revision=revision):
            return revision > seen and any((info.name, info.incarnation) == (name, incarnation) for info in infos)
        case RegistryChanged(changes=changes):
            puts = [c.info for at, c in changes if at > seen and isinstance(c, Registered)]
            return any((info.name, info.incarnation) == (name, incarnation) for info in puts)
        case Heard() | Probed(answer=Answer.SERVING):
            return (event.name, event.incarnation) == (name, incarnation)
    return False


@settings(max_examples=200)
@given(histories())
def test_after_a_listing_the_registered_are_those_of_the_registry(history):
    changes, events = history
    table, now_s = Table(), 0.0
    for event, seconds in events:
        now_s += seconds
        table = reduce(table, event, now_s, CONFIG)
    now = {}
    for _, change in changes:
        match change:
            case Registered(info=info):
                now[info.name] = info
            case Unregistered(name=name):
                now.pop(name, None)
    end = RegistryListed(infos=tuple(now.values()), revision=changes[-1][0])
    table = reduce(table, end, now_s, CONFIG)
    assert {name: member.info for name, member in table.members.items() if member.is_registered} == now
    again = reduce(table, replace(end), now_s, CONFIG)
    assert again is table
