from xllm_compile.scheduler.batches.in_flight import InFlightLimit


def fill(limit, now_s=0.0):
    while limit.may_start(now_s):
        limit.started()
    return limit.num_running


def test_it_doubles_per_round_while_nothing_waits():
    limit = InFlightLimit(max_lines=100)
    for expected in (8, 16, 32, 64, 100, 100):
        assert fill(limit) == expected
        for _ in range(expected):
            limit.ended(num_waiting=0)


def test_it_does_not_grow_without_need():
    limit = InFlightLimit()
    while limit.may_start(0.0) and limit.num_running < 5:
        limit.started()
    for _ in range(5):
        limit.ended(num_waiting=0)
    assert limit.limit == 8


def test_it_does_not_grow_while_sequences_wait():
    limit = InFlightLimit()
    fill(limit)
    limit.ended(num_waiting=1)
    assert limit.limit == 8


def test_refusals_of_one_round_halve_it_once():
    limit = InFlightLimit()
    fill(limit)
    for _ in range(5):
        limit.refused(started_s=1.0, now_s=2.0, retry_after_s=3.0)
    assert limit.limit == 4 and limit.num_running == 3
    assert not limit.may_start(4.9) and limit.may_start(5.0)


def test_one_line_is_always_allowed():
    limit = InFlightLimit()
    for round_s in range(10):
        fill(limit, round_s)
        for _ in range(limit.num_running):
            limit.refused(started_s=round_s, now_s=round_s + 0.5, retry_after_s=0.0)
    assert limit.limit == 1 and fill(limit, 100.0) == 1


def test_the_longest_wait_that_was_asked_for_holds():
    limit = InFlightLimit()
    fill(limit)
    limit.refused(started_s=0.0, now_s=1.0, retry_after_s=10.0)
    limit.refused(started_s=0.0, now_s=2.0, retry_after_s=1.0)
    for _ in range(limit.num_running):
        limit.stopped()
    assert not limit.may_start(10.9) and limit.may_start(11.0)
