"""A store that hangs, fails, lies or is full costs a miss, and is waited for no longer than said."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from xllm_compile.runtime.memory.kv_tiers import KVTiers
from xllm_compile.runtime.memory.remote_tier import ReadBlocks, RemoteTier, StoreError

DIGESTS = [bytes([index]) * 16 for index in range(6)]
BLOCKS = [(digest, digest * 100) for digest in DIGESTS]


class Store:
    """What several clients share."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.max_keys = 1000
        self.gate = threading.Event()
        """Cleared, calls hang."""
        self.gate.set()
        self.is_gone = False
        self.num_connects = 0
        self.num_closed = 0

    def connect(self) -> "Store":
        self.num_connects += 1
        self._pass()
        return self

    def _pass(self) -> None:
        assert self.gate.wait(60)
        if self.is_gone:
            raise StoreError("nobody is there")

    def num_present(self, keys: Sequence[str]) -> int:
        self._pass()
        return next((index for index, key in enumerate(keys) if key not in self.content), len(keys))

    def get(self, key: str) -> bytes | None:
        self._pass()
        return self.content.get(key)

    def put(self, key: str, value: bytes) -> bool:
        self._pass()
        if len(self.content) >= self.max_keys:
            return False
        self.content[key] = value
        return True

    def close(self) -> None:
        self.num_closed += 1


MakeTier = Callable[..., RemoteTier]


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def make_tier(store: Store) -> Iterator[MakeTier]:
    tiers: list[RemoteTier] = []

    def make(layout: str = "layout", timeout_s: float = 60.0, retry_s: float = 0.01) -> RemoteTier:
        tiers.append(RemoteTier(store.connect, layout=layout, timeout_s=timeout_s, retry_s=retry_s))
        until(lambda: tiers[-1].is_up)
        return tiers[-1]

    yield make
    store.gate.set()
    for tier in tiers:
        tier.close()


def until(is_so: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(6000):
        if is_so():
            return
        pause.wait(0.01)
    raise AssertionError("it never came to be so")


def write(tier: RemoteTier, count: int = len(BLOCKS)) -> list[bool]:
    kept: list[bool] = []
    for digest, data in BLOCKS[:count]:
        assert tier.write(digest, data, kept.append)
    tier.flush()
    return kept


def test_what_one_keeps_others_read_up_to_the_first_that_is_missing(store: Store, make_tier: MakeTier) -> None:
    assert write(make_tier(), 4) == [True] * 4
    assert make_tier().read(DIGESTS, 1 << 20).blocks == BLOCKS[:4]
    assert make_tier().read(DIGESTS[1:3], 1 << 20).blocks == BLOCKS[1:3]
    assert make_tier().read(DIGESTS[4:], 1 << 20) == ReadBlocks(blocks=[])
    # A block is read whole, so one more than fits at most.
    assert len(make_tier().read(DIGESTS, 2000).blocks) == 2
    assert make_tier(layout="other weights").read(DIGESTS, 1 << 20).blocks == []


def test_an_altered_block_ends_what_is_read(store: Store, make_tier: MakeTier) -> None:
    tier = make_tier()
    write(tier)
    key = next(key for key in store.content if key.endswith(DIGESTS[2].hex()))
    store.content[key] = store.content[key][:-1]
    assert tier.read(DIGESTS, 1 << 20) == ReadBlocks(blocks=BLOCKS[:2], is_damaged=True)


def test_a_full_store_keeps_no_more(store: Store, make_tier: MakeTier) -> None:
    store.max_keys = 2
    assert write(make_tier()) == [True, True, False, False, False, False]


def test_a_store_that_hangs_is_waited_for_once(
    store: Store, make_tier: MakeTier, caplog: pytest.LogCaptureFixture
) -> None:
    tier = make_tier(timeout_s=0.05, retry_s=0.0)
    write(tier)
    store.gate.clear()
    assert tier.read(DIGESTS, 1 << 20) == ReadBlocks()
    assert not tier.is_up and not tier.write(DIGESTS[0], b"", lambda is_kept: None)
    assert tier.read(DIGESTS, 1 << 20) == ReadBlocks()
    store.gate.set()
    until(lambda: tier.is_up)
    until(lambda: tier.read(DIGESTS, 1 << 20).blocks == BLOCKS)
    said = [record.getMessage() for record in caplog.records]
    assert said == ["the KV store is left out until it answers: no answer within 0.05 s", "the KV store answers again"]


def test_a_store_that_is_gone_is_tried_again_and_said_once(
    store: Store, make_tier: MakeTier, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tier = make_tier()
    write(tier)
    store.is_gone = True
    for _ in range(3):
        assert not tier.read(DIGESTS, 1 << 20).blocks
        until(lambda: tier.is_up)
    assert len(caplog.records) == 1 and "nobody is there" in caplog.text
    store.is_gone = False
    assert tier.read(DIGESTS, 1 << 20).blocks == BLOCKS
    assert len(caplog.records) == 2


def test_one_that_is_not_there_at_first_is_used_once_it_comes(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    store.is_gone = True
    tier = RemoteTier(store.connect, layout="layout", retry_s=0.01)
    until(lambda: store.num_connects >= 3)
    assert not tier.is_up and tier.read(DIGESTS, 1 << 20) == ReadBlocks()
    store.is_gone = False
    until(lambda: tier.is_up)
    assert write(tier) == [True] * 6
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "the KV store is left out until it answers",
        "the KV store answers again",
    ]
    tier.close()
    assert store.num_closed == 1


def test_blocks_on_their_way_are_bounded(store: Store, make_tier: MakeTier) -> None:
    tier = make_tier()
    store.gate.clear()
    taken = [tier.write(index.to_bytes(16, "big"), b"x", lambda is_kept: None) for index in range(100)]
    assert taken == [True] * 64 + [False] * 36


def test_blocks_that_leave_host_memory_come_back_from_the_store(store: Store, make_tier: MakeTier) -> None:
    # Host memory has room for two blocks, and for all.
    here = KVTiers(host_bytes=3300, store=make_tier())
    for digest, data in BLOCKS:
        here.offload(digest, data)
    here.flush()
    assert here.stats.num_stored == 4 and here.stats.num_dropped == 0
    there = KVTiers(host_bytes=1 << 20, store=make_tier())
    reading = there.prefetch(DIGESTS)
    assert reading is not None
    reading.result(60)
    assert [there.read(digest) for digest in DIGESTS] == [*(data for _, data in BLOCKS[:4]), None, None]
    assert there.stats.num_fetched == 4
    # Those are not asked for again.
    assert there.prefetch(DIGESTS[:4]) is None
    for tiers in (here, there):
        tiers.close()
