"""The catalogue behind --explain: no pass is missing, and each says what it did or why it was not run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from xllm_compile.build import plan_halves
from xllm_compile.build_config import BuildConfig
from xllm_compile.device import choose_device
from xllm_compile.graph_passes.device_spec import device_spec
from xllm_compile.graph_passes.quantisation import Quantisation
from xllm_compile.pass_catalogue import pass_rows
from xllm_compile.progress import NoProgress
from xllm_compile.region_programs import make_programs
from xllm_compile.source_reader import read_source

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def rows_for(tiny_model_dir):
    """rows_for(target="npu"): the rows by name, for a small Qwen3 and these options of BuildConfig."""

    def run(buckets=(1, 4), **options):
        config = BuildConfig(model_dir=tiny_model_dir("qwen3"), output=Path("unused"), **options)
        source = read_source(config)
        _, reports = make_programs(source, config, NoProgress())
        device = choose_device(config.target, config.device_spec)
        rows = pass_rows(config, reports, plan_halves(config, source, reports, buckets, device))
        for row in rows:
            has_run = any(report.region in row.reports for report in reports)
            assert has_run == (row.reason == ""), row
        return {row.name: row for row in rows}

    return run


def test_every_pass_is_there_with_its_counts_or_a_reason(rows_for):
    rows = rows_for()
    # A file of graph_passes is a pass when its header has a pass's parts.
    files = {path.stem for path in (REPOSITORY / "graph_passes").glob("*.py") if "\nMatches: " in path.read_text()}
    assert set(rows) == files
    assert rows["merge_linear"].matches("layer") == 2 and rows["merge_linear"].operators("layer") == (23, 22)
    assert rows["last_token_gather"].matches("head") == 1 and rows["last_token_gather"].matches("layer") == 0
    before, after = rows["memory_plan"].operators("layer")
    assert before == after and rows["memory_plan"].matches("layer") > 0
    assert {name: row.reason for name, row in rows.items() if row.reason} == {
        "quantise": "not asked for: --quantize",
        "lower_npu": "only for --target npu",
        "partition": "not asked for: --graph-mode partial",
        "micro_batch_split": "needs --tensor-parallel-size 2 or more: there is no sum to hide",
        "dual_stream": "needs --tensor-parallel-size 2 or more: there is no sum to hide",
        "cube_vector_balance": (
            "only for --target npu: a CPU's cores do both, and its graphs run one operator after the other on all"
        ),
        "all_reduce_rms_norm": "only for --target npu",
    }


def test_what_was_asked_for_and_left_out(rows_for):
    rows = rows_for(
        graph_mode="partial", quantisation=Quantisation(scheme="int8"), disabled_passes=frozenset({"silu_mul"})
    )
    assert rows["quantise"].matches("layer") == 4
    # The pieces of a layer are counted as the layer.
    assert rows["partition"].matches("layer") == 1
    assert rows["partition"].operators("layer") == rows["memory_plan"].operators("layer")
    assert rows["silu_mul"].reason == "left out by --disable-pass silu_mul"


@pytest.mark.parametrize("target", ["cpu", "npu"])
def test_what_the_target_would_not_run_may_be_left_out_by_name(rows_for, target):
    """Of everything in the catalogue it is known that it exists: a script leaves the same passes out for any target."""
    names = {name for name, row in rows_for(target=target).items() if row.reason}
    rows = rows_for(target=target, disabled_passes=frozenset(names))
    assert {name for name, row in rows.items() if row.reason.startswith("left out")} == names
    assert names >= {"partition", "quantise", "lower_npu" if target == "cpu" else "pack_linear"}


def test_halves_of_steps(rows_for):
    declined = rows_for(tensor_parallel_size=2)
    assert declined["dual_stream"].reason == "no bucket gains by it, see below"
    (decisions,) = declined["micro_batch_split"].reports["buckets"]
    assert "bucket 1: one token has no halves" in decisions.skips
    split = rows_for(buckets=(65536,), tensor_parallel_size=2, max_num_batched_tokens=65536)
    assert split["micro_batch_split"].matches("layer") == split["dual_stream"].matches("layer") == 1
    before, after = split["micro_batch_split"].operators("layer")
    assert after > 2 * before


def test_halves_of_steps_on_the_npu(rows_for, tmp_path):
    spec = replace(device_spec("ascend-910b2"), link_bytes_per_s=1e8, link_latency_s=0.0, launch_s=0.0)
    (tmp_path / "slow.json").write_text(json.dumps(spec.to_json()))
    slow = tmp_path / "slow.json"
    rows = rows_for(buckets=(64,), target="npu", tensor_parallel_size=2, device_spec=slow, dtype="bfloat16")
    assert rows["dual_stream"].matches("layer") == 1
    # The halves' lowering is not counted again.
    whole = rows_for(target="npu", tensor_parallel_size=2, dtype="bfloat16")
    assert rows["lower_npu"].matches("layer") == whole["lower_npu"].matches("layer")
    assert "a branch waits for a collective" in rows["cube_vector_balance"].reports["layer"][0].skips


def test_the_npu_has_passes_of_its_own(rows_for):
    rows = rows_for(target="npu")
    assert rows["lower_npu"].matches("layer") > 0
    assert rows["pack_linear"].reason == rows["partition"].reason == "only for --target cpu"
