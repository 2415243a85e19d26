import pytest

from tests.scheduler.policies.instances import info
from xllm_compile.scheduler.policies.copy_times import CopyPrior, CopyTimes

TOKEN_BYTES = 100_000
A, B = (info(name, host=name, kv_bytes_per_token=TOKEN_BYTES) for name in "ab")
PRIOR = CopyPrior(latency_s=0.01, bytes_per_s=1e9)


def taught(latency_s, bytes_per_s, sizes, now=0.0):
    times = CopyTimes(PRIOR)
    for num_tokens in sizes:
        times.observe(A, B, num_tokens, latency_s + num_tokens * TOKEN_BYTES / bytes_per_s, now)
    return times


def test_at_first_the_prior_is_believed():
    times = CopyTimes(PRIOR)
    assert times.seconds(A, B, 0, now=0) == pytest.approx(0.01)
    assert times.seconds(A, B, 10_000, now=0) == pytest.approx(1.01)


@pytest.mark.parametrize(("latency_s", "bytes_per_s"), [(0.002, 10e9), (0.2, 1e8)])
def test_latency_and_speed_are_learnt(latency_s, bytes_per_s):
    times = taught(latency_s, bytes_per_s, [100, 5000, 1000, 20_000] * 5)
    for num_tokens in (1000, 10_000):
        expected = latency_s + num_tokens * TOKEN_BYTES / bytes_per_s
        assert times.seconds(A, B, num_tokens, now=0) == pytest.approx(expected, rel=0.25)
    # Of the way back nothing was learnt.
    assert times.seconds(B, A, 1000, now=0) == pytest.approx(0.11)


def test_equal_copies_are_believed_and_larger_ones_are_not_sooner_done():
    times = taught(0.5, 1e9, [1000] * 10)
    assert times.seconds(A, B, 1000, now=0) == pytest.approx(0.6, rel=0.15)
    assert times.seconds(A, B, 10_000, now=0) >= times.seconds(A, B, 1000, now=0)


def test_what_was_slow_is_tried_again_in_time():
    times = taught(5.0, 1e7, [100, 1000] * 10)
    assert times.seconds(A, B, 100, now=0) > 4
    assert times.seconds(A, B, 100, now=900) < 0.1
    times.observe(A, A, 1, 0.01, now=5000)
    assert ("a", "b") not in times._lines
