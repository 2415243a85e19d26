from typing import Any

import xxhash
from hypothesis import given
from hypothesis import strategies as st

from xllm_compile.runtime.kv_events import KVTier
from xllm_compile.runtime.memory.prefix_cache import BlockChain
from xllm_compile.scheduler.cluster.kv_index import KVHolder, KVIndex, block_keys
from xllm_compile.scheduler.cluster.state import CachedTokens

DEVICE, HOST, DISK = KVTier


def digests_of(*tokens: int) -> list[bytes]:
    """Blocks of one token."""
    chain = BlockChain(1)
    chain.update(tokens)
    return chain.digests


def store(holder: KVHolder, tier: KVTier, digests: list[bytes]) -> None:
    holder.store(tier, block_keys(b"".join(digests)))


def remove(holder: KVHolder, tier: KVTier, digests: list[bytes]) -> None:
    holder.remove(tier, block_keys(b"".join(digests)))


def test_the_longest_prefix_of_each_instance() -> None:
    index = KVIndex()
    a, b, c = (index.add(name) for name in "abc")
    prompt = digests_of(*range(10))
    store(a, DEVICE, prompt)
    store(b, DEVICE, prompt[:4])
    # Without what comes before it is of no use.
    store(c, DEVICE, prompt[1:])
    assert index.match(prompt) == {"a": CachedTokens(device=160), "b": CachedTokens(device=64)}
    assert index.match(digests_of(0, 1, 9)) == {"a": CachedTokens(device=32), "b": CachedTokens(device=32)}
    assert index.match([]) == {} == index.match(digests_of(5))


def test_tiers_go_on_behind_the_device() -> None:
    index = KVIndex()
    a, b = index.add("a"), index.add("b")
    prompt = digests_of(*range(6))
    store(a, DEVICE, prompt[:2] + prompt[4:])
    store(a, HOST, prompt[1:3])
    store(a, DISK, prompt[3:4])
    store(b, DISK, prompt)
    assert index.match(prompt) == {
        # The fifth block is on the device, behind what has to be read: it is not looked for there.
        "a": CachedTokens(device=32, host=16, disk=16),
        "b": CachedTokens(disk=96),
    }
    store(b, HOST, prompt[:3])
    assert index.match(prompt)["b"] == CachedTokens(host=48, disk=48)


def test_what_one_instance_evicts_stays_with_the_others() -> None:
    index = KVIndex(1)
    a, b = index.add("a"), index.add("b")
    prompt = digests_of(1, 2, 3)
    store(a, DEVICE, prompt)
    store(b, DEVICE, prompt)
    remove(a, DEVICE, prompt[1:])
    assert index.match(prompt) == {"a": CachedTokens(device=1), "b": CachedTokens(device=3)}
    assert (a.num_blocks, b.num_blocks, index.num_blocks) == (1, 3, 3)


def test_a_restarted_instance_begins_with_nothing_and_the_old_one_takes_only_its_own() -> None:
    index = KVIndex(1)
    old, other = index.add("a"), index.add("b")
    prompt = digests_of(1, 2)
    for holder in (old, other):
        store(holder, DEVICE, prompt)
    new = index.add("a")
    store(new, DEVICE, prompt[:1])
    old.close()
    assert index.match(prompt) == {"a": CachedTokens(device=1), "b": CachedTokens(device=2)}
    # The place of the old one is taken by the next.
    assert index.match(prompt)["b"] == CachedTokens(device=2)
    third = index.add("c")
    assert "c" not in index.match(prompt)
    for holder in (new, other, third):
        holder.close()
    assert index.num_blocks == 0 and index.match(prompt) == {}


def test_doing_a_change_twice_does_no_harm() -> None:
    index = KVIndex(1)
    a = index.add("a")
    prompt = digests_of(1, 2)
    for _ in range(2):
        store(a, DEVICE, prompt)
        store(a, HOST, prompt)
    for _ in range(2):
        remove(a, DEVICE, prompt)
    assert index.match(prompt) == {"a": CachedTokens(host=2)} and a.num_blocks == 2


def test_blocks_that_come_and_go_leave_nothing_behind(monkeypatch) -> None:
    monkeypatch.setattr("xllm_compile.scheduler.cluster.kv_index._MOST_STALE", 10)
    index = KVIndex(1)
    a, b = index.add("a"), index.add("b")
    for round_ in range(20):
        prompt = digests_of(*range(round_, round_ + 10))
        store(a, DEVICE, prompt)
        store(b, HOST, prompt)
        remove(a, DEVICE, prompt[2:])
        remove(b, HOST, prompt)
    assert (a.num_blocks, b.num_blocks, index.num_blocks) == (40, 0, 40)
    assert len(a._keys) <= 2 * 40 + 10 + 10 and len(b._keys) <= 20
    a.close()
    assert index.num_blocks == 0


def test_a_digest_that_ends_early_is_an_error() -> None:
    try:
        block_keys(b"x" * 17)
    except ValueError as err:
        assert "17 bytes" in str(err)
    else:
        raise AssertionError


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["store", "store", "store", "remove", "clear", "close"]),
        st.integers(0, 4),
        st.sampled_from(list(KVTier)),
        st.integers(0, 6),
        st.integers(0, 8),
    ),
    max_size=40,
)


@given(ACTIONS, st.integers(0, 7))
def test_it_says_what_reading_each_instance_would_say(actions: list[tuple[Any, ...]], length: int) -> None:
    index = KVIndex()
    prompt = [xxhash.xxh3_128_digest(bytes([at])) for at in range(8)]
    holders = [index.add(str(number)) for number in range(5)]
    truth: list[dict[KVTier, set[bytes]]] = [{tier: set() for tier in KVTier} for _ in holders]
    for action, number, tier, begin, count in actions:
        digests = prompt[begin : begin + count]
        if action == "store":
            store(holders[number], tier, digests)
            truth[number][tier].update(digests)
        elif action == "remove":
            remove(holders[number], tier, digests)
            truth[number][tier].difference_update(digests)
        else:
            truth[number] = {each: set() for each in KVTier}
            if action == "clear":
                holders[number].clear()
            else:
                holders[number].close()
                holders[number] = index.add(str(number))
    expected = {str(number): _read(tiers, prompt[:length]) for number, tiers in enumerate(truth)}
    nothing = CachedTokens()
    assert index.match(prompt[:length]) == {name: found for name, found in expected.items() if found != nothing}
    for holder, tiers in zip(holders, truth, strict=True):
        assert holder.num_blocks == len(set().union(*tiers.values()))
    assert index.num_blocks == len(set().union(*(digests for tiers in truth for digests in tiers.values())))


def _read(tiers: dict[KVTier, set[bytes]], prompt: list[bytes]) -> CachedTokens:
    """As KVCache.find and KVTiers.prefetch do."""
    at = 0
    while at < len(prompt) and prompt[at] in tiers[DEVICE]:
        at += 1
    counts = {DEVICE: at, HOST: 0, DISK: 0}
    for digest in prompt[at:]:
        tier = next((tier for tier in (HOST, DISK) if digest in tiers[tier]), None)
        if tier is None:
            break
        counts[tier] += 1
    return CachedTokens(device=16 * counts[DEVICE], host=16 * counts[HOST], disk=16 * counts[DISK])
