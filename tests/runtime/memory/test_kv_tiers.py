import os
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_compile.runtime.memory.block_seal import DamagedBlockError
from xllm_compile.runtime.memory.kv_tiers import DiskTier, KVTiers


def name(index: int) -> bytes:
    return xxhash.xxh3_128_digest(index.to_bytes(4, "little"))


def content(index: int, size: int = 100) -> bytes:
    return bytes([index % 256]) * size


def disk(folder: Path, max_bytes: int = 10_000, layout: str = "a") -> DiskTier:
    return DiskTier(folder, max_bytes=max_bytes, layout=layout)


def test_host_memory_keeps_what_was_used_last() -> None:
    tiers = KVTiers(host_bytes=300)
    for index in range(3):
        tiers.offload(name(index), content(index))
    assert tiers.read(name(0)) == content(0)
    tiers.offload(name(3), content(3))
    assert [index for index in range(4) if name(index) in tiers] == [0, 2, 3]
    assert tiers.stats.host_bytes == 300 and tiers.stats.num_dropped == 1
    tiers.close()


def test_what_host_memory_has_no_room_for_goes_to_disk_and_comes_back(tmp_path: Path) -> None:
    tiers = KVTiers(host_bytes=250, disk=disk(tmp_path))
    for index in range(6):
        tiers.offload(name(index), content(index))
    tiers.flush()
    assert [index for index in range(6) if name(index) in tiers] == [4, 5]
    assert tiers.stats.num_written == 4 and tiers.stats.num_dropped == 0
    loading = tiers.prefetch([name(1), name(2), name(9), name(3)])
    assert loading is not None
    loading.result()
    # Behind a block that is nowhere nothing is of use.
    assert tiers.read(name(1)) == content(1) and tiers.read(name(2)) == content(2) and tiers.stats.num_read == 2
    assert tiers.prefetch([name(1), name(2)]) is None
    tiers.close()


@pytest.mark.parametrize("first_in_host", [0, 6])
def test_of_a_prompt_larger_than_host_memory_the_beginning_is_kept(tmp_path: Path, first_in_host: int) -> None:
    tiers = KVTiers(host_bytes=400, disk=disk(tmp_path))
    prompt = [*range(first_in_host, 10), *range(first_in_host)]
    for index in range(10):
        # The last four are in host memory, the prompt's first or its last ones.
        tiers.offload(name(index), content(index))
    tiers.flush()
    loading = tiers.prefetch([name(index) for index in prompt])
    assert loading is not None
    loading.result()
    tiers.flush()
    assert [index for index in prompt if name(index) in tiers] == prompt[:4]
    # What comes before it is used pushes out its end.
    tiers.offload(name(20), content(20))
    tiers.flush()
    assert [index for index in prompt if name(index) in tiers] == prompt[:3]
    assert [tiers.read(name(index)) for index in prompt[:3]] == [content(index) for index in prompt[:3]]
    tiers.close()


def test_a_block_on_its_way_to_disk_is_still_found(tmp_path: Path) -> None:
    tiers = KVTiers(host_bytes=100, disk=disk(tmp_path))
    for index in range(40):
        tiers.offload(name(index), content(index))
        assert index == 0 or name(index - 1) in tiers or name(index - 1) in tiers._disk  # type: ignore[operator]
    tiers.close()


def test_closing_leaves_everything_to_the_next_start(tmp_path: Path) -> None:
    tiers = KVTiers(host_bytes=1000, disk=disk(tmp_path))
    for index in range(5):
        tiers.offload(name(index), content(index))
    tiers.close()
    again = KVTiers(host_bytes=1000, disk=disk(tmp_path))
    loading = again.prefetch([name(index) for index in range(5)])
    assert loading is not None
    loading.result()
    assert all(again.read(name(index)) == content(index) for index in range(5))
    again.close()


@settings(max_examples=30)
@given(cut=st.integers(0, 123), changed=st.integers(0, 123), is_cut=st.booleans())
def test_a_torn_or_altered_file_is_a_miss_and_never_wrong(
    tmp_path_factory: pytest.TempPathFactory, cut: int, changed: int, is_cut: bool
) -> None:
    folder = tmp_path_factory.mktemp("tier")
    tier = disk(folder)
    tier.write(name(1), content(1))
    (path,) = tier.folder.iterdir()
    whole = path.read_bytes()
    assert len(whole) == 124
    damaged = whole[:cut] if is_cut else whole[:changed] + bytes([whole[changed] ^ 1]) + whole[changed + 1 :]
    path.write_bytes(damaged)
    tiers = KVTiers(host_bytes=1000, disk=disk(folder))
    loading = tiers.prefetch([name(1)])
    assert loading is not None
    loading.result()
    assert name(1) not in tiers and tiers.stats.num_damaged == 1
    assert not path.exists() and tiers.prefetch([name(1)]) is None
    with pytest.raises(DamagedBlockError):
        path.write_bytes(damaged)
        tier.read(name(1))
    tiers.close()


def test_a_write_that_a_crash_interrupted_leaves_nothing(tmp_path: Path) -> None:
    tier = disk(tmp_path)
    (tier.folder / (name(7).hex() + ".part")).write_bytes(b"half")
    (tier.folder / "notes.txt").write_bytes(b"what is this")
    assert name(7) not in disk(tmp_path)
    assert list(tier.folder.iterdir()) == []


def test_the_disk_is_bounded_and_forgets_what_was_used_longest_ago(tmp_path: Path) -> None:
    tier = disk(tmp_path, max_bytes=3 * 124)
    for index in range(3):
        tier.write(name(index), content(index))
    assert tier.read(name(0)) == content(0)
    tier.write(name(3), content(3))
    assert [index for index in range(4) if name(index) in tier] == [0, 2, 3]
    assert sum(path.stat().st_size for path in tier.folder.iterdir()) == tier.num_bytes == 3 * 124
    # A smaller bound at the next start; the files' own times say what is old.
    for age, index in enumerate((3, 2, 0)):
        os.utime(tier._path(name(index)), (1000 - age, 1000 - age))
    assert [index for index in range(4) if name(index) in disk(tmp_path, max_bytes=130)] == [3]


def test_other_layouts_are_other_blocks(tmp_path: Path) -> None:
    disk(tmp_path, layout="a").write(name(1), content(1))
    assert name(1) in disk(tmp_path, layout="a") and name(1) not in disk(tmp_path, layout="b")


def test_a_full_disk_drops_blocks_and_says_so(tmp_path: Path) -> None:
    tier = disk(tmp_path)
    tiers = KVTiers(host_bytes=100, disk=tier)
    os.rmdir(tier.folder)
    for index in range(3):
        tiers.offload(name(index), content(index))
    tiers.flush()
    assert tiers.stats.num_dropped == 2 and tiers.stats.num_written == 0
    assert tiers.read(name(2)) == content(2)
    tiers.close()


def test_bounds_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="host_bytes=0"):
        KVTiers(host_bytes=0)
    with pytest.raises(ValueError, match="max_bytes=0"):
        disk(tmp_path, max_bytes=0)
