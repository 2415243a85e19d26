import pytest

from xllm_compile.scheduler.dashboard.history import History


def test_a_viewer_gets_what_it_does_not_have():
    history = History(3)
    for name in (b"0", b"1", b"2", b"3"):
        history.append(name)
    assert history.next_number == 4
    assert history.since(3) == [b"3"]
    assert history.since(0) == [b"1", b"2", b"3"]
    assert history.since(4) == history.since(99) == []


def test_no_room_is_refused():
    with pytest.raises(ValueError, match="max_samples=0 must be at least 1"):
        History(0)
