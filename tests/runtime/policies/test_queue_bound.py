import pytest

from xllm_compile.runtime.policies.queue_bound import QueueBound, QueueFullError, ServiceTime, check_queue

TIME = ServiceTime(token_s=0.01, sequence_s=0.5)
BOUND = QueueBound(max_waiting=3, max_tokens=100)


def check(waiting: int, tokens: int, new: int, new_tokens: int, bound: QueueBound = BOUND) -> None:
    check_queue(
        num_waiting=waiting,
        num_waiting_tokens=tokens,
        num_new=new,
        num_new_tokens=new_tokens,
        bound=bound,
        time=TIME,
    )


def test_bounds() -> None:
    check(2, 50, 1, 50)
    with pytest.raises(QueueFullError, match="2 sequences wait and 2 more exceed max_waiting=3"):
        check(2, 50, 2, 2)
    with pytest.raises(QueueFullError, match="50 prompt tokens wait and 51 more exceed max_waiting_tokens=100"):
        check(1, 50, 1, 51)
    # A request larger than the bounds must be servable at some time.
    check(0, 0, 9, 900)


def test_offline_requests_may_fill_half_of_it() -> None:
    half = QueueBound(max_waiting=8, max_tokens=100).offline()
    assert (half.max_waiting, half.max_tokens) == (4, 50)
    least = QueueBound(max_waiting=1, max_tokens=1).offline()
    assert (least.max_waiting, least.max_tokens) == (1, 1)
    with pytest.raises(QueueFullError, match="max_waiting=4 for offline requests"):
        check(4, 10, 1, 1, half)


def test_clients_are_told_when_there_will_be_room() -> None:
    bound = QueueBound(max_waiting=10, max_tokens=1000)
    with pytest.raises(QueueFullError) as caught:
        check(10, 400, 2, 10, bound)
    # Two sequences of 40 tokens on average have to go.
    assert caught.value.retry_after_s == pytest.approx(2 * 0.5 + 80 * 0.01)
    with pytest.raises(QueueFullError) as caught:
        check(5, 1000, 1, 400, bound)
    assert caught.value.retry_after_s == pytest.approx(2 * 0.5 + 400 * 0.01)


def test_nobody_waits_for_more_than_the_whole_queue() -> None:
    with pytest.raises(QueueFullError) as caught:
        check(2, 20, 50, 50)
    assert caught.value.retry_after_s == pytest.approx(2 * 0.5 + 20 * 0.01)
