"""Children that end when they are told to, that have to be made to, and that may keep their bytecode."""

import signal
import sys

import pytest

from xllm_compile.benchmarks.child_process import ChildProcess

DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"


def test_it_ends_when_it_is_left():
    with ChildProcess([sys.executable, "-c", "import time; time.sleep(600)"]) as child:
        pass
    assert child.process.returncode == -signal.SIGTERM


def test_one_that_does_not_listen_is_made_to_end():
    with ChildProcess([sys.executable, "-c", DEAF], has_stdout=True, patience_s=0.0) as child:
        assert child.process.stdout is not None
        assert child.process.stdout.readline() == "up\n"
    assert child.process.returncode == -signal.SIGKILL


def test_what_it_said_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    code = "import sys; print('dont_write_bytecode', sys.dont_write_bytecode, file=sys.stderr)"
    with ChildProcess([sys.executable, "-c", code], log=tmp_path / "log") as child:
        child.process.wait()
        assert child.last_words() == "dont_write_bytecode False"
    assert (tmp_path / "log").read_text() == "dont_write_bytecode False\n"


def test_a_command_that_cannot_run():
    with pytest.raises(FileNotFoundError):
        ChildProcess(["no-such-command"])
