import json
import random
from pathlib import Path

from xllm_compile.benchmarks.bench_prefix_cache import ideal_hits, replay, run_prefix_cache
from xllm_compile.benchmarks.record import read_records


def test_without_a_limit_every_block_seen_before_is_found() -> None:
    prompts = [[1, 2, 3], [1, 2, 4], [1, 2, 3, 5], [9]]
    assert ideal_hits(prompts) == 5 == replay(prompts, 100)


def test_a_limit_costs_the_least_recently_used() -> None:
    prompts = [[1, 2], [3, 4], [1, 2], [5, 6], [1, 2], [3, 4]]
    assert ideal_hits(prompts) == 6
    assert replay(prompts, 4) == 4


def test_the_record_says_how_near_the_ideal_it_is(tmp_path: Path) -> None:
    rng = random.Random(0)
    lines = [json.dumps({"hash_ids": [0, *range(start := 10 * rng.randrange(5), start + 3)]}) for _ in range(50)]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(lines))
    run_prefix_cache(trace, tmp_path, ["test"], name="prefix", capacities=[4])
    (record,) = read_records(tmp_path)
    assert record.bars[0].value == 1.0
