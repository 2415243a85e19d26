from xllm_compile.scheduler.finished_times import MAX_TIMES, WINDOW_S, FinishedTimes, percentiles


def test_percentiles_by_nearest_rank():
    assert percentiles([float(n) for n in range(1, 101)], (50, 95, 99, 100)) == [50, 95, 99, 100]
    assert percentiles([3.0], (50, 99)) == [3, 3]
    assert percentiles([], (50, 99)) == [None, None]


def test_what_is_old_is_dropped():
    times = FinishedTimes()
    times.add(0.0, 1.0)
    times.add(WINDOW_S, 2.0)
    assert times.recent(WINDOW_S) == [1, 2]
    assert times.recent(WINDOW_S + 0.1) == [2]


def test_many_requests_take_bounded_memory():
    times = FinishedTimes()
    for number in range(MAX_TIMES + 5):
        times.add(0.0, float(number))
    assert len(times.recent(0.0)) == MAX_TIMES
    assert times.recent(0.0)[0] == 5
