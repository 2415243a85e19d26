"""What is made of the figures of other engines; the engines themselves are in environments of their own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.benchmarks.test_roofline import LIMITS
from xllm_compile.benchmarks.bench_latency import LimitedRates
from xllm_compile.benchmarks.bench_peers import make_bars, ratios
from xllm_compile.benchmarks.bench_precisions import LONG
from xllm_compile.benchmarks.contestants import CASES, OFFLINE, OURS, RUN, Contestant
from xllm_compile.benchmarks.offline_workload import random_workload, read_workload
from xllm_compile.benchmarks.peer_chart import ratio_picture
from xllm_compile.benchmarks.peer_contest import Found, _peak_bytes, _running, _signal
from xllm_compile.benchmarks.peer_models import LLAMA, OPENVINO, find_peers


def contestant(engine: str, setting: str = "") -> Contestant:
    cases = (LONG,) if setting.startswith("KV") else RUN
    return Contestant(engine=engine, setting=setting, module="engine", arguments=["model"], cases=cases)


def found(rate: float, peak_bytes: int, cases: list[str]) -> Found:
    """Every case at one rate in tok/s."""
    rates = {
        case: LimitedRates(tokens_per_s=[rate] * 3, limits=[(LIMITS, LIMITS)] * 3, foreign_cores=[0.0] * 3)
        for case in cases
    }
    return Found(rates=rates, first_tokens=1.0, peak_bytes=peak_bytes)


ENGINES = {"bfloat16": [contestant(OURS), contestant(OPENVINO), contestant(OPENVINO, "KV u8"), contestant(LLAMA)]}
WHOLE = [*(case.name for case in CASES), OFFLINE]


def results(ours: float, openvino: float, long_openvino: float, llama: float) -> dict[str, dict[str, Found]]:
    return {
        "bfloat16": {
            OURS: found(ours, 2000, WHOLE),
            OPENVINO: found(openvino, 3000, WHOLE),
            f"{OPENVINO}, KV u8": found(long_openvino, 10, [LONG.name]),
            LLAMA: found(llama, 1900, WHOLE),
        }
    }


def test_of_each_engine_its_best_setting_counts() -> None:
    against = ratios(results(30.0, 20.0, 40.0, 10.0), ENGINES)["bfloat16"]
    assert against[LONG.name] == {OPENVINO: 0.75, LLAMA: 3.0}
    assert against[OFFLINE] == {OPENVINO: 1.5, LLAMA: 3.0}


def test_rounds_are_compared_one_by_one() -> None:
    of = results(30.0, 20.0, 20.0, 10.0)
    for name, rates in ((OURS, [40.0, 20.0, 21.0]), (OPENVINO, [20.0, 10.0, 30.0])):
        of["bfloat16"][name].rates[OFFLINE].tokens_per_s = rates
    assert ratios(of, ENGINES)["bfloat16"][OFFLINE][OPENVINO] == 2.0


def test_bars() -> None:
    start_s = {"xllm-serve": [1.9, 1.8, 2.5], OURS: [1.0, 1.1], OPENVINO: [2.1, 2.1], LLAMA: [0.1]}
    bars = {bar.what: bar for bar in make_bars(results(30.0, 20.0, 40.0, 10.0), ENGINES, start_s) if bar.bar}
    assert {what: (bar.value, bar.met) for what, bar in bars.items()} == {
        f"bfloat16, {LONG.name}: against OpenVINO at its best KV setting": (0.75, False),
        f"bfloat16, {OFFLINE}: against the best peer (OpenVINO)": (1.5, True),
        # What takes part in one case only is no engine whose memory could be compared.
        "bfloat16: peak resident memory, against the peer with the least (llama.cpp)": (2000 / 1900, False),
        "xllm-serve: start to first token": (1.9, True),
        "xllm-compile: start to first token, against OpenVINO's": (0.5, True),
    }


def test_the_best_peer_is_the_fastest() -> None:
    bars = {bar.what: bar for bar in make_bars(results(30.0, 20.0, 20.0, 28.0), ENGINES, {})}
    offline = bars[f"bfloat16, {OFFLINE}: against the best peer (llama.cpp)"]
    assert offline.value == pytest.approx(30 / 28) and offline.met is False


def test_the_picture_has_every_ratio() -> None:
    picture = ratio_picture("shape <1>", ratios(results(30.0, 20.0, 40.0, 10.0), ENGINES))
    assert "shape &lt;1&gt;, bfloat16" in picture and picture.count("0.75x") == 1
    assert picture.count("3.00x") == len(WHOLE)
    ElementTree.fromstring(picture)


def test_a_workload_is_drawn_from_its_seed() -> None:
    workload = random_workload(64, 1000, seed=3)
    assert workload == random_workload(64, 1000, seed=3) != random_workload(64, 1000, seed=4)
    assert all(16 <= len(prompt) <= 1024 for prompt in workload.prompts)
    assert all(8 <= length <= 128 for length in workload.lengths)
    assert 200 * 64 < workload.num_prompt_tokens < 450 * 64


def test_a_workload_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "workload.json"
    requests = [{"prompt_ids": [1, 2], "max_tokens": 3}, {"prompt_ids": [0], "max_tokens": 4}]
    path.write_text(json.dumps({"mixed": requests, "other": 1}))
    workload = read_workload(path, 64, 3)
    assert (workload.prompts, workload.lengths) == ([[1, 2], [0]], [3, 4])
    assert read_workload(path, 1, 3).lengths == [3]
    with pytest.raises(ValueError, match="has token 2, the model's are below 2"):
        read_workload(path, 64, 2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[", "is no workload"),
        ("[]", "is no workload"),
        ('{"mixed": [{"prompt_ids": [1]}]}', "max_tokens"),
        ('{"mixed": []}', "at least one request"),
        ('{"mixed": [{"prompt_ids": [], "max_tokens": 1}]}', "at least one request"),
        ('{"mixed": [{"prompt_ids": [1], "max_tokens": 0}]}', "at least one request"),
    ],
)
def test_a_bad_workload_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "workload.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"workload.json.*{says}"):
        read_workload(path, 64, 100)


def test_a_python_without_its_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no peer is given"):
        find_peers({})
    with pytest.raises(ValueError, match=r"OpenVINO: .* cannot import openvino_genai.*PEERS\.md"):
        find_peers({OPENVINO: Path(sys.executable)})
    with pytest.raises(ValueError, match=r"llama\.cpp: .* cannot be run"):
        find_peers({LLAMA: tmp_path})


def test_a_python_is_a_file_and_no_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 1.2.3\n")
    script.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    assert find_peers({LLAMA: Path("./python")}).versions[LLAMA] == "1.2.3"


@pytest.mark.integration
def test_a_process_that_is_not_measured_stands_still() -> None:
    def state() -> str:
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]

    code = "print('ready', flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        _signal(process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        assert state() == "T"
        with _running(process.pid):
            os.waitid(os.P_PID, process.pid, os.WCONTINUED)
            assert state() != "T"
            assert _peak_bytes(process.pid) > 2**20
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        assert state() == "T"
    finally:
        process.kill()
        process.communicate()
