"""xllm-bench check: every bar is shown, and --strict turns a missed one into an exit code."""

import pytest
from click.testing import CliRunner

from xllm_compile.benchmarks import cli
from xllm_compile.benchmarks.commands import options
from xllm_compile.benchmarks.record import Bar, make_record


@pytest.fixture
def results(tmp_path):
    def write(name: str, value: float):
        bars = [Bar(what=f"{name} time", value=value, unit="s", bar="<= 4"), Bar(what="other", value=1, unit="")]
        make_record(name, ["xllm-bench"], seed=0, raw={}, bars=bars).write(tmp_path)
        return tmp_path

    return write


def check(folder, *options: str):
    return CliRunner().invoke(cli.command, ["check", "--results", str(folder), *options])


def test_met_and_missed_bars_are_shown(results):
    results("first", 3)
    done = check(results("second", 5))
    assert done.exit_code == 0
    assert "1 bars met, 1 not met" in done.output


def test_strict_fails_on_a_missed_bar_only(results):
    assert check(results("first", 3), "--strict").exit_code == 0
    assert check(results("second", 5), "--strict").exit_code == 1


def test_an_empty_folder_names_the_next_step(tmp_path):
    done = check(tmp_path)
    assert done.exit_code != 0
    assert "xllm-bench startup" in done.output


def test_shapes_of_the_command_line_are_those_that_exist():
    from xllm_compile.benchmarks.checkpoints import SHAPES

    assert set(options.SHAPE_NAMES) == set(SHAPES)


@pytest.mark.parametrize("given", [["--api-key", "secret"], ["--api-key=secret"]])
def test_a_key_stays_out_of_the_record(monkeypatch, given):
    monkeypatch.setattr("sys.argv", ["xllm-bench", "serve", *given, "http://localhost:1"])
    words = options.command_line()
    assert "secret" not in " ".join(words)
    assert words[-1] == "http://localhost:1"
