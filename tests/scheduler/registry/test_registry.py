"""The contract of a registry: in memory, in another process's memory, and in etcd."""

import asyncio

import pytest

from xllm_compile.scheduler.registry.registry import Change, Guard, LeaseLostError


async def take(changes, count):
    """That many changes, as (key, value or None)."""
    taken: list[Change] = []
    async with asyncio.timeout(20):
        while len(taken) < count:
            taken += await anext(changes)
    return [(change.key, change.entry.value if change.entry else None) for change in taken]


async def test_put_get_delete(registry, prefix):
    assert await registry.get(prefix + "k") is None
    first = await registry.put(prefix + "k", b"1")
    second = await registry.put(prefix + "k", b"\x00\xff")
    entry = await registry.get(prefix + "k")
    assert (entry.key, entry.value, entry.revision, entry.lease_id) == (prefix + "k", b"\x00\xff", second, 0)
    assert second > first
    assert await registry.delete(prefix + "k")
    assert await registry.get(prefix + "k") is None
    assert await registry.delete(prefix + "k")


async def test_a_snapshot_has_the_keys_of_the_prefix_by_name(registry, prefix):
    assert (await registry.snapshot(prefix)).entries == ()
    for key in ("b/2", "b/1", "a", "b", "c"):
        last = await registry.put(prefix + key, key.encode())
    snapshot = await registry.snapshot(prefix + "b")
    assert [(entry.key, entry.value) for entry in snapshot.entries] == [
        (prefix + key, key.encode()) for key in ("b", "b/1", "b/2")
    ]
    assert snapshot.revision >= last
    assert {entry.key for entry in snapshot.entries} < {entry.key for entry in (await registry.snapshot("")).entries}


async def test_a_watch_from_a_snapshot_misses_and_repeats_nothing(registry, prefix):
    await registry.put(prefix + "a", b"1")
    snapshot = await registry.snapshot(prefix)
    # Before the watch begins, under another prefix, and after it began.
    await registry.put(prefix + "b", b"2")
    await registry.put("/elsewhere" + prefix, b"")
    changes = registry.watch(prefix, snapshot.revision)
    assert await take(changes, 1) == [(prefix + "b", b"2")]
    await registry.put(prefix + "a", b"3")
    await registry.delete(prefix + "b")
    assert await take(changes, 2) == [(prefix + "a", b"3"), (prefix + "b", None)]
    # From the past as well.
    assert await take(registry.watch(prefix, snapshot.revision), 3) == [
        (prefix + "b", b"2"),
        (prefix + "a", b"3"),
        (prefix + "b", None),
    ]


async def test_revisions_of_changes_and_entries_agree(registry, prefix):
    since = (await registry.snapshot(prefix)).revision
    put = await registry.put(prefix + "k", b"")
    (change,) = await anext(registry.watch(prefix, since))
    assert change.revision == change.entry.revision == put == (await registry.get(prefix + "k")).revision


async def test_create_if_absent(registry, prefix):
    absent = Guard(key=prefix + "k", revision=0)
    revision = await registry.put(prefix + "k", b"first", guard=absent)
    assert revision is not None
    assert await registry.put(prefix + "k", b"second", guard=absent) is None
    assert (await registry.get(prefix + "k")).value == b"first"
    await registry.delete(prefix + "k")
    assert await registry.put(prefix + "k", b"third", guard=absent) > revision


async def test_compare_and_put(registry, prefix):
    revision = await registry.put(prefix + "k", b"1")
    guard = Guard(key=prefix + "k", revision=revision)
    assert await registry.put(prefix + "k", b"2", guard=guard) > revision
    assert await registry.put(prefix + "k", b"3", guard=guard) is None
    assert not await registry.delete(prefix + "k", guard=guard)
    assert (await registry.get(prefix + "k")).value == b"2"


async def test_a_guard_on_another_key_fences(registry, prefix):
    leader = Guard(key=prefix + "leader", revision=await registry.put(prefix + "leader", b"me"))
    assert await registry.put(prefix + "k", b"mine", guard=leader) is not None
    await registry.put(prefix + "leader", b"another")
    assert await registry.put(prefix + "k", b"late", guard=leader) is None
    assert not await registry.delete(prefix + "k", guard=leader)
    assert (await registry.get(prefix + "k")).value == b"mine"


async def test_of_many_who_create_one_does(registry, prefix):
    absent = Guard(key=prefix + "k", revision=0)
    puts = [registry.put(prefix + "k", b"%d" % at, guard=absent) for at in range(20)]
    revisions = await asyncio.gather(*puts)
    (winner,) = [at for at, revision in enumerate(revisions) if revision is not None]
    assert (await registry.get(prefix + "k")).value == b"%d" % winner


async def test_a_revoked_lease_takes_its_keys(registry, prefix):
    lease_id = await registry.grant_lease(60)
    since = await registry.put(prefix + "a", b"", lease_id=lease_id)
    since = await registry.put(prefix + "b", b"", lease_id=lease_id)
    assert (await registry.get(prefix + "a")).lease_id == lease_id
    await registry.revoke_lease(lease_id)
    assert sorted(await take(registry.watch(prefix, since), 2)) == [(prefix + "a", None), (prefix + "b", None)]
    await registry.revoke_lease(lease_id)
    with pytest.raises(LeaseLostError):
        await registry.keep_alive(lease_id)
    with pytest.raises(LeaseLostError):
        await registry.put(prefix + "a", b"", lease_id=lease_id)
    assert (await registry.snapshot(prefix)).entries == ()


async def test_a_lease_ends_when_nobody_keeps_it(registry, prefix):
    lease_id = await registry.grant_lease(1)
    since = await registry.put(prefix + "k", b"", lease_id=lease_id)
    assert await take(registry.watch(prefix, since), 1) == [(prefix + "k", None)]
    with pytest.raises(LeaseLostError):
        await registry.keep_alive(lease_id)


async def test_a_kept_lease_outlives_one_that_is_not(registry, prefix):
    kept, left = await registry.grant_lease(1), await registry.grant_lease(2)
    await registry.put(prefix + "kept", b"", lease_id=kept)
    since = await registry.put(prefix + "left", b"", lease_id=left)
    ends = asyncio.ensure_future(take(registry.watch(prefix, since), 1))
    while not ends.done():
        await registry.keep_alive(kept)
        await asyncio.wait([ends], timeout=0.2)
    assert await ends == [(prefix + "left", None)]
    await registry.revoke_lease(kept)


async def test_a_key_belongs_to_the_lease_of_its_last_put(registry, prefix):
    old, new = await registry.grant_lease(60), await registry.grant_lease(60)
    await registry.put(prefix + "moved", b"", lease_id=old)
    await registry.put(prefix + "freed", b"", lease_id=old)
    await registry.put(prefix + "moved", b"", lease_id=new)
    await registry.put(prefix + "freed", b"")
    await registry.revoke_lease(old)
    assert [entry.lease_id for entry in (await registry.snapshot(prefix)).entries] == [0, new]
    await registry.revoke_lease(new)
    assert [entry.key for entry in (await registry.snapshot(prefix)).entries] == [prefix + "freed"]


async def test_a_watch_can_be_left(registry, prefix):
    changes = registry.watch(prefix, (await registry.snapshot(prefix)).revision)
    waiting = asyncio.ensure_future(anext(changes))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await changes.aclose()
    await registry.put(prefix + "k", b"")


async def test_watchers_see_the_same(registry, prefix):
    since = (await registry.snapshot(prefix)).revision
    watchers = [asyncio.create_task(take(registry.watch(prefix, since), 50)) for _ in range(3)]
    expected = []
    for number in range(50):
        key = f"{prefix}{number % 7}"
        await registry.put(key, b"%d" % number)
        expected.append((key, b"%d" % number))
    assert [await watcher for watcher in watchers] == [expected] * 3


@pytest.mark.parametrize("key", ["/unicode/\u00e4/\u65e5", "/space here", "/" + "x" * 500])
async def test_odd_keys(registry, prefix, key):
    await registry.put(prefix + key, b"")
    assert [entry.key for entry in (await registry.snapshot(prefix)).entries] == [prefix + key]
    await registry.delete(prefix + key)


async def test_bad_arguments(registry):
    with pytest.raises(ValueError, match="ttl_s=0 of a lease must be"):
        await registry.grant_lease(0)
    with pytest.raises(ValueError, match="a key must not be empty"):
        await registry.put("", b"")
