"""The log of changes, and the promise that an index made of it is the engine's own."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.fakes import EngineFactory, train_byte_level
from tests.runtime.test_engine import run
from xllm_compile.runtime.async_engine import AsyncEngine
from xllm_compile.runtime.kv_cache import KVCache
from xllm_compile.runtime.kv_events import KVChange, KVEventLog, KVTier
from xllm_compile.runtime.memory.kv_tiers import DiskTier, KVTiers
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.runtime.tokenizer import Tokenizer

D = KVTier.DEVICE
TIERS = tuple(KVTier)


def change(index: int) -> KVChange:
    return KVChange(D, True, index.to_bytes(16, "little"))


def record(log: KVEventLog, *indices: int) -> None:
    for index in indices:
        log.record(*change(index))


def test_nothing_is_kept_before_somebody_reads() -> None:
    log = KVEventLog()
    record(log, 1, 2, 3)
    assert log.next_number == 4 and log.since(1) is None
    record(log, 4)
    assert log.since(4) == [change(4)]


@given(st.integers(0, 9), st.integers(0, 30), st.integers(0, 45))
def test_the_last_changes_are_there_by_number(before: int, count: int, number: int) -> None:
    log = KVEventLog(max_changes=7)
    record(log, *range(1, before + 1))
    log.since(0)
    record(log, *range(before + 1, before + count + 1))
    end = before + count + 1
    first = max(before + 1, end - 7)
    expected = [change(index) for index in range(number, end)] if first <= number <= end else None
    assert log.since(number) == expected


def test_whoever_waits_is_called_once() -> None:
    log, calls = KVEventLog(), []
    log.since(0)
    log.call_after(1, lambda: calls.append("one"))
    assert not calls
    record(log, 1, 2)
    log.call_after(2, lambda: calls.append("two"))
    assert calls == ["one", "two"]

    def unwanted() -> None:
        calls.append("unwanted")

    log.call_after(3, unwanted)
    log.forget(unwanted)
    record(log, 3)
    assert calls == ["one", "two"]


class Follower:
    """What a watcher makes of the log."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.restart()

    def restart(self) -> None:
        self.cache.log.since(0)
        self.place = self.cache.log.next_number
        found = self.cache.digests()
        self.found = {tier: set(found.get(tier, ())) for tier in TIERS}

    def follow(self) -> None:
        changes = self.cache.log.since(self.place)
        if changes is None:
            self.restart()
            return
        self.place += len(changes)
        for tier, is_stored, digest in changes:
            (self.found[tier].add if is_stored else self.found[tier].discard)(digest)

    def check(self) -> None:
        """Nothing is under way."""
        if self.cache.tiers is not None:
            self.cache.tiers.flush()
        self.follow()
        found = self.cache.digests()
        assert self.found == {tier: set(found.get(tier, ())) for tier in TIERS}


@settings(max_examples=30)
@given(
    actions=st.lists(
        st.one_of(
            st.tuples(st.just("run"), st.integers(0, 5), st.integers(4, 50)),
            st.sampled_from(["follow", "restart", "fail", "sleep", "abort"]).map(lambda name: (name,)),
        ),
        max_size=12,
    ),
    with_tiers=st.booleans(),
    is_async=st.booleans(),
)
def test_snapshot_and_changes_are_the_own_index(
    actions: list[tuple[Any, ...]],
    with_tiers: bool,
    is_async: bool,
    property_tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    disk = None
    if with_tiers:
        disk = DiskTier(tmp_path_factory.mktemp("kv"), max_bytes=400_000, layout="a")
    tiers = KVTiers(host_bytes=200_000, disk=disk) if with_tiers else None
    engine, runner = EngineFactory(property_tokenizer, is_async=is_async)(
        max_model_len=64, total_tokens=130, block_tokens=4, tiers=tiers
    )
    cache = engine._kv_cache
    follower = Follower(cache)
    # Somebody who always comes too late.
    cache.log._max_changes = 16
    for index, (name, *values) in enumerate(actions):
        if name == "run":
            prompt = [100 + 10 * values[0] + at % 7 for at in range(values[1])]
            engine.add_request(str(index), prompt, SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
            run(engine)
        elif name == "fail":
            runner.fails = True
            engine.add_request(str(index), [5] * 20, SamplingParams(max_tokens=4))
            with pytest.raises(RuntimeError, match="gone"):
                run(engine)
            runner.fails = False
            engine.abort(str(index))
            run(engine)
        elif name == "sleep":
            engine.release_memory()
            assert not cache.digests()[D]
        elif name == "abort":
            engine.add_request(str(index), [7] * 30, SamplingParams(max_tokens=4))
            engine.step()
            engine.abort(str(index))
            run(engine)
        elif name == "follow":
            follower.follow()
        else:
            follower.restart()
        follower.check()
    engine.close()


@pytest.fixture(scope="module")
def property_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_byte_level().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    return Tokenizer.from_directory(directory)


async def test_a_snapshot_taken_while_the_engine_runs(make_sync_engine: EngineFactory, tmp_path: Path) -> None:
    tiers = KVTiers(host_bytes=200_000, disk=DiskTier(tmp_path, max_bytes=400_000, layout="a"))
    engine, _ = make_sync_engine(max_model_len=64, total_tokens=130, block_tokens=4, tiers=tiers)
    cache = engine._kv_cache
    serving = AsyncEngine(engine)
    followers: list[Follower] = []
    is_over = threading.Event()

    def follow() -> None:
        while not is_over.wait(0.001):
            followers.append(Follower(cache))
            for follower in followers:
                follower.follow()

    thread = threading.Thread(target=follow)
    thread.start()
    for index in range(20):
        params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
        prompt = [100 + 10 * (index % 5) + at % 7 for at in range(50)]
        async for _ in serving.generate(str(index), prompt, params):
            pass
    is_over.set()
    await asyncio.to_thread(thread.join)
    await asyncio.to_thread(serving.shutdown)
    assert len(followers) > 1
    for follower in followers:
        follower.check()
    engine.close()
