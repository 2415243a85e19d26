import pytest

from xllm_compile.runtime.memory.page_pool import PagePool, PagePoolEmptyError


def test_states_of_a_page() -> None:
    pool = PagePool(3)

    def states() -> tuple[int, ...]:
        return tuple(pool.num_by_state()[name] for name in ("free", "allocated", "mapped", "reusable"))

    page = pool.take()
    assert page == 0 and states() == (2, 1, 0, 0)
    pool.hold(page)
    pool.hold(page)
    assert states() == (2, 0, 1, 0) and pool.num_available == 2
    pool.let_go(page)
    assert states() == (2, 0, 1, 0) and pool.num_holders(page) == 1
    pool.let_go(page)
    assert states() == (2, 0, 0, 1) and pool.num_available == 3
    pool.free(page)
    assert states() == (3, 0, 0, 0)


def test_pages_go_the_oldest_first_and_those_with_content_last() -> None:
    pool = PagePool(4)
    pages = [pool.take() for _ in range(4)]
    for page in pages:
        pool.hold(page)
    pool.index(pages[:2])
    for page in (1, 3, 0, 2):
        pool.let_go(page)
    assert pool.num_spare == 2
    pool.touch(1)
    assert [pool.take() for _ in range(4)] == [3, 2, 0, 1]
    with pytest.raises(PagePoolEmptyError, match="all 4 pages are held"):
        pool.take()


def test_what_lost_its_content_goes_before_what_has_it() -> None:
    pool = PagePool(2)
    for _ in range(2):
        page = pool.take()
        pool.hold(page)
        pool.index([page])
    pool.let_go(0)
    pool.let_go(1)
    pool.unindex(1)
    assert not pool.is_indexed(1)
    assert pool.take() == 1


def test_the_next_free_pages_are_those_that_are_taken() -> None:
    pool = PagePool(5)
    pool.take()
    coming = pool.next_free(3)
    assert [pool.take() for _ in range(3)] == coming and pool.next_free(3) == [4]
    pool.take()
    assert pool.next_free(3) == []
