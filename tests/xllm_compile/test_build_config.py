from pathlib import Path

import pytest

from xllm_compile.build import pick_buckets
from xllm_compile.build_config import MAX_BUCKETS_BY_DEFAULT, BuildConfig, read_workload


def config(**options):
    return BuildConfig(model_dir=Path("model"), output=Path("model.xllm"), **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": "tpu"}, "target 'tpu' is not built yet; available: cpu"),
        ({"dtype": "float16"}, "dtype='float16' is not supported; supported: auto, bfloat16, float32"),
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


def test_buckets(tmp_path):
    given = pick_buckets(config(buckets=(64, 1, 4, 4)))
    assert (given.tokens, given.logits, given.reason) == ((1, 4, 64), (1, 4), "given")
    default = pick_buckets(config(max_num_batched_tokens=100))
    assert default.tokens[-1] == 100 and len(default.tokens) <= MAX_BUCKETS_BY_DEFAULT
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"input_length": 37, "output_length": 0}\n' * 9)
    chosen = pick_buckets(config(max_num_batched_tokens=100, workload=trace))
    assert chosen.tokens == (37, 100) and "trace.jsonl" in chosen.reason


def test_workloads_of_both_forms(tmp_path):
    rows = [(10, 20), (30, 40)]
    csv, jsonl = tmp_path / "w.csv", tmp_path / "w.jsonl"
    csv.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(f"x,{a},{b}\n" for a, b in rows))
    jsonl.write_text("".join(f'{{"input_length": {a}, "output_length": {b}, "id": 1}}\n' for a, b in rows))
    assert read_workload(csv) == read_workload(jsonl) == rows


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("w.txt", "", "must be a .csv or .jsonl file"),
        ("w.csv", None, "does not exist"),
        ("w.csv", "ContextTokens,GeneratedTokens\n", "holds no request"),
        ("w.csv", "ContextTokens\n1\n", "request 1: needs ContextTokens and GeneratedTokens"),
        ("w.jsonl", '{"input_length": 1, "output_length": 2}\n{"input_length": "many"}\n', "request 2: needs"),
        ("w.jsonl", "not json\n", "request 1: needs"),
    ],
)
def test_bad_workloads(tmp_path, name, text, said):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        read_workload(tmp_path / name)
