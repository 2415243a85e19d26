import pytest

from xllm_compile.benchmarks.bench_transfer import measure_sizes, open_ways

REGION = 8 << 20


@pytest.mark.integration
def test_every_way_is_measured_at_every_size(kernels):
    with open_ways(kernels, ["shm", "tcp"], REGION) as ways:
        for size in (64, 4 << 20):
            seconds = measure_sizes(ways, size, 2, REGION)
            assert list(seconds) == ["copy by libc", "copy past the caches", "plain TCP", "shm", "tcp"]
            assert all(len(summary.values) == 2 and summary.min > 0 for summary in seconds.values())
