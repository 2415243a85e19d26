import asyncio

import pytest

from xllm_compile.scheduler.errors import ApiError
from xllm_compile.scheduler.limits import StreamLimiter


def test_the_one_too_many_is_refused_and_a_freed_slot_is_taken_again():
    limiter = StreamLimiter(2)
    with limiter.slot():
        with limiter.slot():
            with pytest.raises(ApiError) as refused, limiter.slot():
                pass
            assert refused.value.kind.status == 429
            assert refused.value.retry_after_s
        with limiter.slot():
            assert limiter.num_open == 2
    assert limiter.num_open == 0
    assert limiter.num_refused == 1


def test_a_slot_is_freed_by_an_error():
    limiter = StreamLimiter(1)
    with pytest.raises(KeyError), limiter.slot():
        raise KeyError
    assert limiter.num_open == 0


async def test_wait_idle_ends_when_the_last_slot_is_freed():
    limiter = StreamLimiter(2)
    with limiter.slot():
        waiting = asyncio.create_task(limiter.wait_idle(30))
        await asyncio.sleep(0)
        assert not waiting.done()
        assert not await limiter.wait_idle(0)
    assert await waiting


def test_a_limit_below_one_is_refused():
    with pytest.raises(ValueError, match="max_open=0"):
        StreamLimiter(0)
