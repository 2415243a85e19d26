"""Seconds from work: the arithmetic of the model and the data files it reads."""

import json
from dataclasses import replace

import pytest

from xllm_compile.graph_passes.cost_model import CostModel, NodeCost
from xllm_compile.graph_passes.device_spec import (
    DEVICES,
    DeviceSpec,
    DeviceSpecError,
    Efficiency,
    cpu_device_spec,
    device_spec,
    read_device_spec,
    write_device_spec,
)

SPEC = DeviceSpec(
    name="round",
    sources={},
    cores={"cube": 4, "vector": 8},
    core_flops={"cube": {"bfloat16": 1e9, "float32": 5e8}, "vector": {"float32": 1e8}},
    memory_bytes_per_s=1e9,
    cache_bytes=1000,
    cache_bytes_per_s=1e10,
    link_bytes_per_s=1e8,
    link_latency_s=1e-3,
    launch_s=0.0,
    efficiency={"linear": Efficiency(compute=0.5, memory=0.5, half_rows=2.0, row_tile=4)},
)
MODEL = CostModel(spec=SPEC)
LINEAR = NodeCost(
    unit="cube", family="linear", dtype="bfloat16", flops=6e6, flops_per_row=1e6, bytes_read=1e4, bytes_cold=1e4
)


def test_rows_are_rounded_to_tiles_and_start_slowly():
    # 6 rows take two tiles, 8 rows, and 2 more to get going, at half of 4e9 flop/s.
    assert MODEL.compute_seconds(LINEAR) == pytest.approx(10e6 / 2e9)
    float32 = replace(LINEAR, dtype="float32")
    assert MODEL.compute_seconds(float32) == pytest.approx(2 * MODEL.compute_seconds(LINEAR))
    # float16 is not listed: as the widest.
    assert MODEL.compute_seconds(replace(LINEAR, dtype="float16")) == MODEL.compute_seconds(float32)


def test_the_longer_of_computing_and_moving_counts():
    assert MODEL.seconds(LINEAR) == pytest.approx(5e-3)
    moving = replace(LINEAR, bytes_read=1e7, bytes_cold=1e7)
    assert MODEL.seconds(moving) == pytest.approx(1e7 / 0.5e9)
    serial = CostModel(spec=replace(SPEC, efficiency={"linear": Efficiency(overlap=0.0)}))
    assert serial.seconds(moving) == pytest.approx(6e6 / 4e9 + 1e7 / 1e9)


def test_what_was_just_written_is_read_from_the_cache_where_it_fits():
    small = NodeCost(unit="vector", family="token_wise", bytes_read=400, bytes_written=400)
    assert MODEL.seconds(small) == pytest.approx(800 / 1e10)
    assert MODEL.seconds(replace(small, bytes_read=2000)) == pytest.approx(2400 / 1e9)
    assert MODEL.seconds(replace(small, bytes_cold=400)) == pytest.approx(400 / 1e9 + 400 / 1e10)


def test_messages_cost_latency_and_bandwidth():
    reduce = NodeCost(unit="communication", family="collective", bytes_link=1e6, messages=2)
    assert MODEL.seconds(reduce) == pytest.approx(2e-3 + 1e-2)


def test_a_share_of_the_cores_takes_longer_in_proportion():
    assert MODEL.seconds(LINEAR, share=0.25) == pytest.approx(4 * MODEL.seconds(LINEAR))
    launched = CostModel(spec=replace(SPEC, launch_s=1.0))
    assert launched.seconds(LINEAR, share=0.25) == pytest.approx(1 + 4 * 5e-3)
    with pytest.raises(ValueError, match="share=0"):
        MODEL.seconds(LINEAR, share=0.0)


def test_cores_that_have_no_tile_bring_no_bandwidth():
    """Four tiles for eight cores: four of them read, each at its own rate."""
    cost = NodeCost(unit="cube", family="linear", dtype="float32", bytes_read=8e6, bytes_cold=8e6, outputs=(1, 1, 128))
    tiled = {"linear": Efficiency(tile_rows=12, tile_columns=32)}
    spec = replace(SPEC, cores={"cube": 8, "vector": 8}, efficiency=tiled, core_bytes_per_s=SPEC.memory_bytes_per_s / 8)
    assert CostModel(spec=spec).seconds(cost) == pytest.approx(8e6 / (4 * SPEC.memory_bytes_per_s / 8))


@pytest.mark.parametrize("path", sorted(DEVICES.glob("*.json")), ids=lambda path: path.stem)
def test_every_device_file_says_where_its_figures_come_from(path):
    spec = read_device_spec(path)
    assert spec.name == path.stem
    wanted = {"cores", "core_flops", "memory_bytes_per_s", "cache_bytes", "link_bytes_per_s", "launch_s", "efficiency"}
    assert wanted <= spec.sources.keys() and all(spec.sources.values())
    assert spec.peak_flops("cube", "bfloat16") >= spec.peak_flops("cube", "float32")


def test_int8_without_a_rate_computes_as_bfloat16():
    rates = {unit: {"bfloat16": 4e9, "float32": 1e9} for unit in ("cube", "vector")}
    assert replace(SPEC, core_flops=rates).peak_flops("cube", "int8") == SPEC.cores["cube"] * 4e9
    rates["cube"]["int8"] = 7e9
    assert replace(SPEC, core_flops=rates).peak_flops("cube", "int8") == SPEC.cores["cube"] * 7e9


def test_ascend_figures():
    spec = device_spec("ascend-910b2")
    assert (spec.cores["cube"], spec.cores["vector"]) == (24, 48)
    assert spec.peak_flops("cube", "float16") == pytest.approx(353.9e12, rel=1e-3)
    assert spec.peak_flops("vector", "float16") == pytest.approx(22.1e12, rel=2e-3)


def test_cpus_by_features():
    assert cpu_device_spec(("amx_bf16", "amx_tile", "avx512_bf16"), 2).name == "cpu-amx"
    assert cpu_device_spec(("avx512_bf16",), 2).name == "cpu-avx512"
    wide = cpu_device_spec(("avx2",), 8)
    assert wide.name == "cpu-avx2" and wide.cores["cube"] == 8
    assert wide.memory_bytes_per_s == 4 * device_spec("cpu-avx2").memory_bytes_per_s
    assert cpu_device_spec(("avx2",), 128).memory_bytes_per_s == wide.most_bytes_per_s


def test_written_and_read_back(tmp_path):
    path = tmp_path / "deep" / "spec.json"
    write_device_spec(path, SPEC)
    assert read_device_spec(path) == SPEC
    assert [entry.name for entry in path.parent.iterdir()] == ["spec.json"]


def test_what_is_sent_while_computing_costs_the_longer_of_the_two():
    computing = NodeCost(unit="vector", family="linear", dtype="float32", flops=1e8)
    model = CostModel(spec=SPEC)
    alone = model.seconds(computing)
    for sent, seconds in ((1e7, alone), (3e8, 3.0)):
        assert sent / SPEC.link_bytes_per_s < alone or seconds > alone
        assert model.seconds(replace(computing, bytes_link=sent, sends_while_computing=True)) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"memory_bytes_per_s": 0}, "memory_bytes_per_s=0"),
        ({"most_bytes_per_s": -1}, "most_bytes_per_s=-1"),
        ({"memory_bytes_per_s": "fast"}, "memory_bytes_per_s='fast' must be above 0"),
        ({"launch_s": float("inf")}, "launch_s=inf must be finite and at least 0"),
        ({"cores": {"cube": 0, "vector": 1}}, "cube needs a number of cores, at least one"),
        ({"cores": {"cube": 2.5, "vector": 1}}, "cube needs .* not 2.5"),
        ({"core_flops": {"cube": {"float32": 0}, "vector": {"float32": 1}}}, "cube needs .* peak rates above 0"),
        ({"dynamic_overhead": 0.5}, "dynamic_overhead=0.5"),
        ({"efficiency": {"linaer": {}}}, "'linaer'; families: linear"),
        ({"efficiency": {"linear": {"compute": 0}}}, "compute=0"),
        ({"efficiency": {"linear": {"speed": 1}}}, "speed"),
        ({"colour": "red"}, "unknown field 'colour'"),
    ],
)
def test_bad_specs_name_file_and_field(tmp_path, change, said):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({**SPEC.to_json(), **change}))
    with pytest.raises(DeviceSpecError, match=said) as error:
        read_device_spec(path)
    assert str(path) in str(error.value)


def test_unreadable_specs(tmp_path):
    with pytest.raises(DeviceSpecError, match=r"nowhere\.json: No such file"):
        read_device_spec(tmp_path / "nowhere.json")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(DeviceSpecError, match=r"text\.json is no JSON"):
        read_device_spec(tmp_path / "text.json")
    (tmp_path / "part.json").write_text('{"name": "x"}')
    with pytest.raises(DeviceSpecError, match=r"part\.json: 'cache_bytes' is missing"):
        read_device_spec(tmp_path / "part.json")
    with pytest.raises(DeviceSpecError, match=r"'h300'; devices: ascend-910b2"):
        device_spec("h300")
