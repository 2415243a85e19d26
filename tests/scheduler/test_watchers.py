import asyncio

import pytest

from xllm_compile.scheduler.watchers import Watchers


@pytest.fixture
def gone(monkeypatch):
    monkeypatch.setattr("xllm_compile.scheduler.watchers.GRACE_S", 0.0)
    return []


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


async def test_who_stops_watching_is_gone(gone):
    watchers = Watchers(gone.append)
    with watchers.watching("a"), watchers.watching(""):
        pass
    await until(lambda: gone)
    assert gone == ["a"]


async def test_who_has_another_stream_or_comes_back_in_time_is_not_gone(gone):
    watchers = Watchers(gone.append)
    with watchers.watching("a"):
        with watchers.watching("a"):
            pass
        await asyncio.sleep(0.01)
    # Before the loop comes by.
    with watchers.watching("a"):
        await asyncio.sleep(0.01)
        assert not gone
    await until(lambda: gone)
    assert gone == ["a"]
