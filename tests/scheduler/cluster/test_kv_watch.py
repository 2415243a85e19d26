"""From an instance's log to a gateway's index, by messages."""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc.aio
import pytest

from tests.scheduler.cluster.test_kv_index import digests_of
from xllm_compile.runtime.kv_events import KVEventLog, KVTier
from xllm_compile.scheduler import kv_stream
from xllm_compile.scheduler.cluster import kv_watch
from xllm_compile.scheduler.cluster.kv_index import KVIndex
from xllm_compile.scheduler.cluster.kv_watch import apply_events, watch_kv
from xllm_compile.scheduler.kv_stream import kv_messages
from xllm_compile.scheduler.proto import xllm_pb2, xllm_pb2_grpc


class Source:
    """An engine's index without the engine."""

    def __init__(self, max_changes: int = 1000) -> None:
        self.log = KVEventLog(max_changes)
        self.blocks: dict[KVTier, dict[bytes, None]] = {tier: {} for tier in KVTier}

    def store(self, *tokens: int, tier: KVTier = KVTier.DEVICE) -> None:
        for digest in digests_of(*tokens):
            if digest not in self.blocks[tier]:
                self.blocks[tier][digest] = None
                self.log.record(tier, True, digest)

    def remove(self, *tokens: int, tier: KVTier = KVTier.DEVICE) -> None:
        """The last block of the tokens."""
        digest = digests_of(*tokens)[-1]
        if self.blocks[tier].pop(digest, self) is not self:
            self.log.record(tier, False, digest)

    def digests(self) -> dict[KVTier, list[bytes]]:
        return {tier: list(blocks) for tier, blocks in self.blocks.items()}

    def messages(self, sequence: int = 0, incarnation: str = "1") -> AsyncGenerator[Any, None]:
        request = xllm_pb2.WatchKvRequest(sequence=sequence, incarnation=incarnation)
        return kv_messages(self.log, self.digests, request, incarnation="1")


class Watched:
    """An index of one instance."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.index = KVIndex(1)
        self.holder = self.index.add("a")
        self.num_snapshots = 0

    async def follow(self, count: int, incarnation: str = "1") -> None:
        """So many messages."""
        async with aclosing(self.source.messages(self.holder.place, incarnation)) as messages:
            for _ in range(count):
                message = await asyncio.wait_for(anext(messages), 5)
                self.num_snapshots += message.is_snapshot
                assert apply_events(self.holder, message, incarnation="1")

    def found(self, *tokens: int) -> int:
        cached = self.index.match(digests_of(*tokens)).get("a")
        return 0 if cached is None else cached.device


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(kv_stream, "COALESCE_S", 0.0)
    monkeypatch.setattr(kv_watch, "RETRY_S", 0.0)


async def test_a_snapshot_then_changes_then_going_on_where_it_stopped():
    source = Source()
    source.store(1, 2, 3)
    watched = Watched(source)
    await watched.follow(1)
    assert watched.found(1, 2, 3, 4) == 3 and watched.num_snapshots == 1
    source.store(1, 2, 3, 4)
    source.remove(1, 2)
    await watched.follow(1)
    assert watched.found(1, 2, 3) == 1 and watched.num_snapshots == 1
    assert watched.holder.num_blocks == 3


async def test_changes_of_a_moment_are_one_message():
    source = Source()
    watched = Watched(source)
    await watched.follow(1)
    for token in range(20):
        source.store(token)
    source.remove(3)
    source.store(3)
    async with aclosing(source.messages(watched.holder.place)) as messages:
        message = await anext(messages)
    assert (message.sequence, message.next_sequence) == (1, 23)
    assert [(event.is_removed, len(event.digests)) for event in message.events] == [
        (False, 320),
        (True, 16),
        (False, 16),
    ]
    assert apply_events(watched.holder, message, incarnation="1") and watched.found(3) == 1


async def test_whoever_waits_hears_of_a_change_made_in_another_thread():
    source = Source()
    watched = Watched(source)
    await watched.follow(1)
    task = asyncio.create_task(watched.follow(1))
    await asyncio.sleep(0)
    await asyncio.to_thread(source.store, 7)
    await task
    assert watched.found(7) == 1
    # Nobody waits any more.
    waiting = asyncio.create_task(watched.follow(1))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert not source.log._callbacks


async def test_whoever_is_too_slow_gets_a_snapshot():
    source = Source(max_changes=8)
    watched = Watched(source)
    await watched.follow(1)
    source.store(*range(100))
    source.remove(*range(100))
    await watched.follow(1)
    assert watched.num_snapshots == 2 and watched.found(*range(100)) == 99


async def test_the_place_of_another_incarnation_is_gone():
    source = Source()
    watched = Watched(source)
    await watched.follow(1)
    source.store(1)
    watched.holder.place = 1
    await watched.follow(1, incarnation="0")
    assert watched.num_snapshots == 2 and watched.found(1) == 1


async def test_half_a_snapshot_is_no_place_to_go_on_from(monkeypatch):
    monkeypatch.setattr(kv_stream, "MAX_DIGESTS", 2)
    source = Source()
    source.store(1, 2, 3, 4, 5)
    watched = Watched(source)
    await watched.follow(2)
    assert watched.holder.place == 0 and watched.found(1, 2, 3, 4, 5) == 4
    source.remove(1, 2, 3, 4)
    await watched.follow(2)
    assert watched.num_snapshots == 2 and watched.found(1, 2, 3, 4) == 3
    assert watched.holder.place == 7 and watched.holder.num_blocks == 4


def test_a_gap_and_another_instance_are_noticed():
    holder = KVIndex(1).add("a")
    digests = digests_of(1)[0]
    event = xllm_pb2.KvEvent(digests=digests)
    snapshot = xllm_pb2.KvEvents(incarnation="1", is_snapshot=True, next_sequence=5)
    assert apply_events(holder, snapshot, incarnation="1")
    late = xllm_pb2.KvEvents(incarnation="1", sequence=6, next_sequence=7, events=[event])
    assert not apply_events(holder, late, incarnation="1")
    other = xllm_pb2.KvEvents(incarnation="2", sequence=5, next_sequence=6, events=[event])
    assert not apply_events(holder, other, incarnation="1")
    assert holder.place == 5 and holder.num_blocks == 0


class LossyServicer(xllm_pb2_grpc.InstanceServicer):
    """Ends streams wherever they are, and leaves changes out."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.rng = random.Random(0)
        self.num_calls = 0

    async def WatchKv(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.num_calls += 1
        async with aclosing(self.source.messages(request.sequence, request.incarnation)) as messages:
            async for message in messages:
                if self.rng.random() < 0.3:
                    return
                if not message.sequence or self.rng.random() < 0.7:
                    yield message


async def test_the_index_comes_to_be_right_whatever_is_lost(monkeypatch):
    monkeypatch.setattr(kv_stream, "MAX_DIGESTS", 3)
    source = Source(max_changes=40)
    servicer = LossyServicer(source)
    server = grpc.aio.server()
    xllm_pb2_grpc.add_InstanceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    holder = KVIndex(1).add("a")
    rng = random.Random(1)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = xllm_pb2_grpc.InstanceStub(channel)
        task = asyncio.create_task(watch_kv(stub, holder, incarnation="1", metadata=()))
        for _ in range(200):
            tier = rng.choice(list(KVTier))
            tokens = range(rng.randrange(3), rng.randrange(4, 9))
            (source.store if rng.random() < 0.6 else source.remove)(*tokens, tier=tier)
            await asyncio.sleep(0.001)
        servicer.rng.random = lambda: 0.5  # type: ignore[method-assign]
        async with asyncio.timeout(10):
            while holder.place != source.log.next_number:
                # Whoever lost the last message hears of it with the next one.
                source.store(500 + servicer.num_calls)
                source.store(900 + rng.randrange(10**6))
                await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])
    await server.stop(None)
    assert servicer.num_calls > 5
    every = {digest for blocks in source.blocks.values() for digest in blocks}
    assert holder.num_blocks == len(every)
    for tier, blocks in source.blocks.items():
        for digest in blocks:
            found = holder._index._holders[int.from_bytes(digest[:8], "little") >> 4]
            assert found >> tier & 1


class NovelServicer(xllm_pb2_grpc.InstanceServicer):
    """Has a tier that nobody knows of."""

    async def WatchKv(self, request: Any, context: Any) -> AsyncIterator[Any]:
        first, second = (b"".join(digests_of(token)) for token in (1, 2))
        events = [xllm_pb2.KvEvent(digests=first), xllm_pb2.KvEvent(tier=7, digests=second)]  # type: ignore[arg-type]
        yield xllm_pb2.KvEvents(incarnation="1", is_snapshot=True, next_sequence=5, events=events)


async def test_an_instance_of_a_later_version(caplog):
    server = grpc.aio.server()
    xllm_pb2_grpc.add_InstanceServicer_to_server(NovelServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    holder = KVIndex(1).add("a")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await watch_kv(xllm_pb2_grpc.InstanceStub(channel), holder, incarnation="1", metadata=())
    await server.stop(None)
    assert "7 is not a valid KVTier" in caplog.text and holder.num_blocks == 0


async def test_an_instance_that_says_nothing_of_its_kv(caplog):
    server = grpc.aio.server()
    xllm_pb2_grpc.add_InstanceServicer_to_server(xllm_pb2_grpc.InstanceServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = xllm_pb2_grpc.InstanceStub(channel)
        await watch_kv(stub, KVIndex(1).add("a"), incarnation="1", metadata=())
    await server.stop(None)
    assert "a does not say" in caplog.text
