import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.runtime.speculative.proposer import Speculation
from xllm_compile.runtime.speculative.suffix import SuffixProposer
from xllm_compile.runtime.speculative.suffix_index import MAX_DEPTH, MAX_OCCURRENCES, Matches, PairIndex, TextStore

Tokens = st.lists(st.integers(0, 3), max_size=60)


def longest_match(text: list[int]) -> int:
    """Length of the longest suffix of at least two tokens that occurs earlier, overlaps allowed."""
    for length in range(min(len(text) - 1, MAX_DEPTH), 1, -1):
        if any(text[at : at + length] == text[-length:] for at in range(len(text) - length)):
            return length
    return 0


def read(text: list[int]) -> Matches:
    index = PairIndex()
    matches = Matches(index)
    for end in range(1, len(text) + 1):
        matches.advance(text, end)
        if end >= 2:
            index.add(text, end)
    return matches


@settings(max_examples=300)
@given(st.lists(st.integers(0, 9), max_size=60))
def test_the_longest_match_is_the_one_that_a_search_finds(text: list[int]) -> None:
    pairs = [text[at : at + 2] for at in range(len(text) - 1)]
    if any(pairs.count(pair) > MAX_OCCURRENCES for pair in pairs):
        return
    matches = read(text)
    assert min(matches.length, MAX_DEPTH) == longest_match(text)


@settings(max_examples=200)
@given(Tokens, st.integers(1, 12))
def test_a_draft_follows_text_that_is_there(text: list[int], limit: int) -> None:
    matches = read(text)
    draft = matches.draft(text, limit, 0.1)
    assert len(draft) <= limit
    for size in range(1, len(draft) + 1):
        # The match and what was drafted so far occur together; past the end the text goes on with its own draft.
        wanted = text[len(text) - min(matches.length, MAX_DEPTH) :] + draft[:size]
        whole = text + draft[: size - 1]
        assert any(whole[at : at + len(wanted)] == wanted for at in range(len(whole)))


def test_the_most_frequent_continuation_wins_and_the_newest_of_equals() -> None:
    text = [1, 2, 3, 9, 1, 2, 4, 9, 1, 2, 3, 8, 1, 2]
    assert read(text).draft(text, 1, 0.1) == [3]
    text = [1, 2, 3, 8, 1, 2, 4, 9, 1, 2]
    assert read(text).draft(text, 1, 0.1) == [4]
    assert read(text).draft(text, 1, 0.6) == []


def test_a_loop_is_drafted_beyond_the_end_of_the_text() -> None:
    text = [5, 6, 7] * 4
    assert read(text).draft(text, 8, 0.1) == [5, 6, 7, 5, 6, 7, 5, 6]


def test_a_store_keeps_what_was_of_use_and_leaves_nothing_of_what_it_dropped() -> None:
    store = TextStore(max_tokens=30)
    texts = [list(range(begin, begin + 10)) for begin in (0, 100, 200)]
    for text in texts:
        store.add(text)
    matches = Matches(store.index)
    matches.advance([3, 4], 2)
    assert matches.draft([3, 4], 3, 0.1) == [5, 6, 7]
    store.touch(matches)
    store.add(list(range(300, 310)))
    assert store.num_tokens == 30
    assert store.index.places((103, 104)) == ()
    assert len(store.index) == 27
    assert store.index.places((3, 4))


@settings(max_examples=100)
@given(st.lists(st.lists(st.integers(0, 4), max_size=20), max_size=12))
def test_a_store_is_bounded(texts: list[list[int]]) -> None:
    store = TextStore(max_tokens=40)
    for text in texts:
        store.add(text)
    assert store.num_tokens <= 40
    kept = list(itertools.chain.from_iterable(store.index._places.values()))
    alive = {id(text): text for text, _ in kept}
    assert sum(map(len, alive.values())) <= 40
    assert all(places for places in store.index._places.values())


def speculation(token_ids: list[int]) -> Speculation:
    return Speculation(
        params=SamplingParams(), token_ids=token_ids, num_prompt_tokens=len(token_ids), max_output_tokens=99
    )


def test_finished_outputs_serve_other_requests_and_prompts_do_not() -> None:
    proposer = SuffixProposer(max_shared_tokens=100)
    first = speculation([1, 2, 3, 4])
    proposer.observe(first)
    first.token_ids += [20, 21, 22, 23, 24]
    proposer.observe(first)
    proposer.forget(first)
    second = speculation([7, 20, 21])
    kind = proposer.observe(second)
    assert kind is not None
    (draft,) = proposer.propose([second], [8])
    assert draft.token_ids == [22, 23] and draft.drawn_from is None
    assert proposer.observe(speculation([9, 1, 2])) is None
    alone = SuffixProposer(max_shared_tokens=0)
    alone.forget(first)
    assert alone.observe(second) is None


@settings(max_examples=100)
@given(Tokens, st.lists(st.integers(1, 6), min_size=1))
def test_several_tokens_at_once_match_like_one_after_the_other(text: list[int], sizes: list[int]) -> None:
    prompt, rest = text[:5], text[5:]
    if not prompt:
        return
    slow, fast = (SuffixProposer(max_shared_tokens=0) for _ in range(2))
    one, many = speculation(list(prompt)), speculation(list(prompt))
    slow.observe(one)
    fast.observe(many)
    for size in sizes:
        new, rest = rest[:size], rest[size:]
        for token in new:
            one.token_ids.append(token)
            slow.observe(one)
        many.token_ids += new
        assert fast.observe(many) == slow.observe(one)
        assert fast.propose([many], [6]) == slow.propose([one], [6])
