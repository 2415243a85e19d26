import random
from pathlib import Path

import pytest

from xllm_compile.benchmarks.bench_xtensor import draw_length, measure_attention, measure_latency, measure_memory


def test_memory_is_needed_bytes_in_whole_pages() -> None:
    memory = measure_memory([1, 18, 19, 100])
    assert memory["page_bytes"] == 2 << 20
    # 112 KiB per token: 18 tokens fit a page.
    assert memory["mapped_bytes"] == (1 + 1 + 2 + 6) * (2 << 20)
    assert memory["needed_bytes"] == 138 * 112 * 1024


def test_every_step_is_timed_and_prompts_are_told_apart() -> None:
    latencies, prompts = measure_latency(random.Random(1), 2, 12)
    assert len(latencies) == len(prompts) == 12
    assert all(seconds > 0 for seconds in latencies)
    assert prompts[0] > 0 and prompts[1] > 0


def test_lengths_keep_their_bounds() -> None:
    rng = random.Random(2)
    assert all(16 <= draw_length(rng) <= 4096 for _ in range(500))


@pytest.mark.numerics
def test_the_block_table_kernels_give_the_very_same_attention(tmp_path: Path) -> None:
    # It compares them before it measures.
    assert set(measure_attention(1, 64, 1)) == {"mapped ranges", "block table", "block table, huge pages"}
