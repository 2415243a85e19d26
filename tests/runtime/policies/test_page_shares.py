import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_compile.runtime.policies.page_shares import PageUse, num_granted, num_surplus


@pytest.mark.parametrize(
    ("use", "num_free", "is_contested", "expected"),
    [
        # What is wanted, and what would otherwise be evicted for it.
        (PageUse(num_owned=4, num_held=2, num_cached=2, num_wanted=3), 100, False, 3),
        (PageUse(num_owned=4, num_held=2, num_cached=2, num_wanted=3), 2, False, 2),
        (PageUse(num_owned=4, num_held=2, num_cached=0, num_wanted=1), 100, False, 0),
        # Others lack some: up to an equal share, and nothing for what is only cached.
        (PageUse(num_owned=4, num_held=4, num_cached=0, num_wanted=50), 100, True, 6),
        (PageUse(num_owned=10, num_held=2, num_cached=8, num_wanted=8), 100, True, 0),
        # But one full sequence in any case.
        (PageUse(num_owned=0, num_held=0, num_wanted=50, min_pages=12), 100, True, 12),
    ],
)
def test_free_pages_go_to_who_asks_and_while_others_lack_some_to_an_equal_share(
    use: PageUse, num_free: int, is_contested: bool, expected: int
) -> None:
    assert num_granted(use, num_free=num_free, fair_share=10, is_contested=is_contested) == expected


@pytest.mark.parametrize(
    ("use", "expected"),
    [
        # An idle model keeps one sequence's pages.
        (PageUse(num_owned=30, num_cached=28, min_pages=4), 26),
        # A busy one what it has in use, and of what it wants its share.
        (PageUse(num_owned=30, num_held=6, num_wanted=1, min_pages=4), 23),
        (PageUse(num_owned=30, num_held=6, num_wanted=99, min_pages=4), 20),
        (PageUse(num_owned=30, num_held=29, num_wanted=99, min_pages=4), 1),
    ],
)
def test_a_model_gives_up_what_it_can_do_without(use: PageUse, expected: int) -> None:
    assert num_surplus(use, fair_share=10) == expected


COUNTS = st.integers(0, 40)


@given(COUNTS, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS)
def test_nobody_gives_up_live_pages_nor_those_of_one_sequence(
    owned: int, held: int, cached: int, wanted: int, least: int, fair_share: int
) -> None:
    owned = max(owned, least, held)
    use = PageUse(num_owned=owned, num_held=held, num_cached=cached, num_wanted=wanted, min_pages=least)
    left = owned - num_surplus(use, fair_share=fair_share)
    assert left >= max(held, least)
    granted = num_granted(use, num_free=fair_share, fair_share=fair_share, is_contested=True)
    # What is given up is not asked back.
    assert not (granted and num_surplus(use, fair_share=fair_share))
