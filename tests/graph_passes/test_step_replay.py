"""The replay against sequences of steps worked out by hand, and against what must come out whatever happens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_compile.graph_passes.step_replay import replay_steps


def second(tokens, keys):
    return 1.0


def replay(requests, step_time=second, max_tokens=8, max_seqs=4):
    return replay_steps(requests, step_time, max_tokens=max_tokens, max_seqs=max_seqs)


def test_one_request():
    # 20 tokens in chunks of 8, 8, 4; the first output token comes with the last, three decodes follow.
    assert replay([(0.0, 20, 4)]) == {1: 3, 4: 1, 8: 2}
    assert replay([(0.0, 20, 1)]) == replay([(0.0, 20, 0)]) == {4: 1, 8: 2}


def test_decodes_ride_with_the_next_prompt():
    # Step 1 (5), 2 (1 + 7 of 9), 3 (1 + 2), 4 (the second alone, its first decode).
    assert replay([(0.0, 5, 3), (0.5, 9, 2)]) == {1: 1, 3: 1, 5: 1, 8: 1}


def test_arrivals_decide_the_batch():
    together, apart = [(0.0, 1, 10)] * 4, [(20.0 * index, 1, 10) for index in range(4)]
    assert replay(together) == {4: 10}
    assert replay(apart) == {1: 40}
    # Slower steps let more of them meet.
    assert replay([(5.0 * index, 1, 10) for index in range(2)]) == {1: 10, 2: 5}


def test_seats_are_limited():
    assert replay([(0.0, 1, 3)] * 3, max_seqs=2) == {1: 3, 2: 3}


def test_step_times_see_the_keys_of_decodes():
    seen = []

    def step_time(tokens, keys):
        seen.append((tokens, keys))
        return 1.0

    replay([(0.0, 3, 3), (0.0, 2, 2)], step_time)
    assert seen == [(5, 0 + 5), (2, 4 + 3), (1, 5)]


@given(
    st.lists(st.tuples(st.floats(0, 50), st.integers(1, 40), st.integers(0, 12)), max_size=30),
    st.integers(1, 16),
    st.integers(1, 16),
)
def test_every_token_is_computed_once(requests, max_tokens, max_seqs):
    requests = sorted(requests)
    sizes = replay(requests, max_tokens=max_tokens, max_seqs=min(max_seqs, max_tokens))
    assert sum(size * count for size, count in sizes.items()) == sum(p + max(0, o - 1) for _, p, o in requests)
    assert all(1 <= size <= max_tokens for size in sizes)


@pytest.mark.parametrize(
    ("requests", "limits", "said"),
    [
        ([], {"max_tokens": 2, "max_seqs": 3}, "max_seqs=3"),
        ([(0.0, 0, 1)], {}, "request 0"),
        ([(5.0, 1, 9), (4.0, 1, 1)], {}, "request 1"),
    ],
)
def test_bad_input(requests, limits, said):
    with pytest.raises(ValueError, match=said):
        replay(requests, **limits)
