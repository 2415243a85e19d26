from pathlib import Path

import pytest

from xllm_compile.bucket_plan import pick_buckets, read_workload, step_histogram
from xllm_compile.build_config import MAX_BUCKETS_BY_DEFAULT, BuildConfig
from xllm_compile.graph_passes.step_cost import StepTimes


def config(**options):
    return BuildConfig(model_dir=Path("model"), output=Path("model.xllm"), **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": "tpu"}, "target 'tpu' is not built yet; available: cpu"),
        ({"target": "cuda"}, "target 'cuda' is not built yet: .* neither kernels nor a lowering; available: cpu, npu"),
        ({"dtype": "float16"}, "dtype='float16' is not supported; supported: auto, bfloat16, float32"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype='fp8' is not supported; supported: auto, int8"),
        ({"max_model_len": 1}, "max_model_len=1 must be at least 2"),
        ({"max_num_batched_tokens": 0}, r"max_num_batched_tokens=0 must be in \[1, 65536\]"),
        ({"max_num_batched_tokens": 65537}, "max_num_batched_tokens=65537"),
        ({"jobs": 0}, "jobs=0 must be at least 1"),
        ({"buckets": (1, 0)}, r"bucket 0 is outside \[1, max_num_batched_tokens=512\]"),
        ({"buckets": (65,), "max_num_batched_tokens": 64}, "bucket 65 is outside"),
        ({"buckets": (1,), "workload": Path("w.csv")}, "buckets and workload exclude each other"),
    ],
)
def test_bad_options_name_field_value_and_limit(options, said):
    with pytest.raises(ValueError, match=said):
        config(**options)


def picked(**options):
    chosen = config(**options)
    times = StepTimes(sizes=(1, 512), seconds=(1.0, 20.0), dynamic_overhead=1.1)
    histogram = step_histogram(read_workload(chosen), chosen.max_num_batched_tokens, times, 0.0)
    return pick_buckets(chosen, histogram, times)


def test_buckets(tmp_path):
    given = picked(buckets=(64, 1, 4, 4))
    assert (given.tokens, given.logits, given.reason) == ((1, 4, 64), (1, 4), "given")
    default = picked(max_num_batched_tokens=100)
    assert default.tokens[-1] == 100 and len(default.tokens) <= MAX_BUCKETS_BY_DEFAULT
    # Rows are next to free in these times, and yet one sequence alone is not padded.
    assert default.tokens[0] == default.logits[0] == 1
    assert picked(max_num_batched_tokens=1).tokens == (1,)
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"input_length": 37, "output_length": 0}\n' * 9)
    chosen = picked(max_num_batched_tokens=100, workload=trace)
    assert chosen.tokens == (37, 100) and "trace.jsonl" in chosen.reason
