"""Which device spec a build uses."""

from pathlib import Path

import pytest

from xllm_compile.device import calibrated_path, choose_device
from xllm_compile.graph_passes.device_spec import DeviceSpecError, device_spec, write_device_spec


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_given_before_calibrated_before_built_in(tmp_path):
    assert choose_device("cpu", None).origin == "built in"
    assert choose_device("npu", None).spec == device_spec("ascend-910b2")
    calibrated = device_spec("cpu-avx2").with_cores(3)
    write_device_spec(calibrated_path(), calibrated)
    chosen = choose_device("cpu", None)
    assert (chosen.origin, chosen.spec) == ("calibrated", calibrated)
    assert choose_device("cuda", None).spec.name == "h200"
    write_device_spec(tmp_path / "mine.json", device_spec("h200"))
    for given in (Path("h200"), tmp_path / "mine.json"):
        chosen = choose_device("cpu", given)
        assert (chosen.origin, chosen.spec) == ("given", device_spec("h200"))
    assert chosen.to_json()["origin"] == "given"


def test_specs_that_cannot_be_used(tmp_path):
    with pytest.raises(DeviceSpecError, match="no device is named 'h300'"):
        choose_device("cpu", Path("h300"))
    calibrated_path().parent.mkdir(parents=True)
    calibrated_path().write_text("{")
    with pytest.raises(DeviceSpecError, match="run xllm-bench calibrate"):
        choose_device("cpu", None)


def test_the_calibrated_spec_is_this_machines(monkeypatch):
    path = calibrated_path()
    monkeypatch.setattr("xllm_compile.device.num_cpus", lambda: 97)
    assert calibrated_path() != path
