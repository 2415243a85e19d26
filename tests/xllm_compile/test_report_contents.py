"""What a build puts on its page and into its trace, from the plan alone: nothing is compiled."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from xllm_compile.build import make_plan
from xllm_compile.build_config import BuildConfig
from xllm_compile.device import choose_device
from xllm_compile.graph_passes.device_spec import device_spec
from xllm_compile.progress import NoProgress
from xllm_compile.report.contents import write_reports
from xllm_compile.source_reader import read_source
from xllm_compile.targets.npu.lowering import NpuLowering


@pytest.fixture
def reports(tiny_model_dir, tmp_path, monkeypatch):
    """reports(target="npu"): the page, and the slices of each planned timeline by its name. The link is slow."""
    # Part of the keys of graphs, of which there are none: torch_npu is not needed to plan.
    monkeypatch.setattr(NpuLowering, "environment", lambda lowering: [])

    def write(target="cpu", device="cpu-avx512", **options):
        spec = replace(device_spec(device), link_bytes_per_s=1e7, link_latency_s=0.0, launch_s=0.0)
        (tmp_path / "slow.json").write_text(json.dumps(spec.to_json()))
        config = BuildConfig(
            model_dir=tiny_model_dir("qwen3"),
            output=Path("unused"),
            target=target,
            dtype="bfloat16",
            device_spec=tmp_path / "slow.json",
            buckets=(1, 64),
            max_num_batched_tokens=64,
            **options,
        )
        chosen = choose_device(config.target, config.device_spec)
        write_reports(tmp_path, make_plan(config, read_source(config), chosen, [], "", "", NoProgress()))
        events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
        names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
        slices = {
            name: [event for event in events if event["ph"] == "X" and event["pid"] == pid]
            for pid, name in names.items()
        }
        return (tmp_path / "index.html").read_text(), slices

    return write


def hidden_us(slices):
    """How long a sum is on its way while something is computed."""
    ends = [(entry["ts"], entry["ts"] + entry["dur"], entry["cat"] == "communication") for entry in slices]
    sums, others = ([end[:2] for end in ends if end[2] is kind] for kind in (True, False))
    return sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a, b in product(sums, others))


@pytest.mark.parametrize(("target", "device"), [("cpu", "cpu-avx512"), ("npu", "ascend-910b2")])
def test_steps_in_halves_are_planned_and_drawn(reports, target, device):
    page, slices = reports(target, device, tensor_parallel_size=2)
    assert "way: in the buckets\n64." in page
    assert "<td>micro_batch_split</td><td>layer.split</td>" in page and "bucket 1: one token has no halves" in page
    whole, halves = slices["layer, prefill of 64 tokens"], slices["layer, prefill of 64 tokens in halves"]
    assert hidden_us(whole) == 0 < hidden_us(halves)


def test_of_one_rank_there_is_nothing_to_say_about_halves(reports):
    page, slices = reports()
    assert "halves" not in page
    assert list(slices) == ["layer, decode of 1 token, context 1024", "layer, prefill of 64 tokens"]
