import pytest

from xllm_compile.scheduler.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("17B", 17),
        ("4GiB", 4 << 30),
        ("4G", 4 << 30),
        ("1.5 GB", 1_500_000_000),
        ("512mib", 512 << 20),
        ("2k", 2048),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "4 potatoes", "-1GiB", "1e9", "0", "0.1B"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match=r"size|above 0"):
        parse_size(text)
