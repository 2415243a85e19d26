from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.policies.items import Item
from xllm_compile.runtime.policies.admission import fits, growth_of
from xllm_compile.runtime.policies.state import Capacity

ITEMS = st.lists(
    st.tuples(st.integers(0, 30), st.sampled_from([1, 1, 1, 7, 20]), st.integers(0, 40)), min_size=1, max_size=6
)


def make(items: list[tuple[int, int, int]], block_tokens: int) -> list[Item]:
    return [
        Item(str(index), computed + uncomputed, computed, num_growth_tokens=growth, block_tokens=block_tokens)
        for index, (computed, uncomputed, growth) in enumerate(items)
    ]


def is_prefill(item: Item) -> bool:
    return item.num_uncomputed_tokens > 1 or item.num_computed_tokens == 0


def replay(items: list[Item], free: int, block_tokens: int, horizon: int) -> bool:
    """Token by token: whether nobody ever lacks a block."""
    held = sum(item.num_kv_blocks for item in items)
    for step in range(horizon + 1):
        # Prompts end some time later, so what they take in the end is theirs until the horizon.
        alive = [item for item in items if item.num_growth_tokens >= step or is_prefill(item)]
        grown = [item.num_tokens + min(step, item.num_growth_tokens) for item in alive]
        if sum(-(-tokens // block_tokens) for tokens in grown) > free + held:
            return False
    return True


@settings(max_examples=300)
@given(ITEMS, st.integers(0, 200), st.integers(0, 50))
def test_tokens_are_counted_exactly(items: list[tuple[int, int, int]], free: int, horizon: int) -> None:
    made = make(items, 1)
    capacity = Capacity(num_blocks=1000, num_free_blocks=free)
    assert fits([growth_of(item, capacity, horizon) for item in made], free, 1) == replay(made, free, 1, horizon)


@settings(max_examples=300)
@given(ITEMS, st.integers(0, 60), st.integers(0, 50), st.integers(2, 8))
def test_blocks_are_never_counted_short(
    items: list[tuple[int, int, int]], free: int, horizon: int, block_tokens: int
) -> None:
    made = make(items, block_tokens)
    capacity = Capacity(num_blocks=1000, num_free_blocks=free, block_tokens=block_tokens)
    growths = [growth_of(item, capacity, horizon) for item in made]
    if fits(growths, free, block_tokens):
        assert replay(made, free, block_tokens, horizon)
    elif fits(growths, free - len(made), block_tokens):
        raise AssertionError("fewer blocks cannot be better")


def test_shared_blocks_do_not_come_free() -> None:
    ends = Item("a", 11, 10, num_growth_tokens=2)
    long = Item("b", 1, 0, num_growth_tokens=20)
    capacity = Capacity(num_blocks=100, num_free_blocks=15)
    growths = [growth_of(item, capacity, 100) for item in (ends, long)]
    # "a" gives back 10 when it ends, which "b" then has room in.
    assert fits(growths, 15, 1)
    shared = [growths[0]._replace(num_freed_blocks=0), growths[1]]
    assert not fits(shared, 15, 1)
