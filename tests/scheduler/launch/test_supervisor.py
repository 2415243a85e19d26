"""The supervisor over real processes that stand in for servers: each line of a script is one life of its process."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]

# Serves, dies or refuses as the file that bears its name says, one line for each time it is started.
STAND_IN = """
import os, pathlib, signal, sys, time
name, folder = sys.argv[1], pathlib.Path(sys.argv[2])
lives = (folder / name).read_text().splitlines()
with (folder / "log").open("a") as log:
    print(f"{name} starts {os.getpid()}", file=log)
number = (folder / "log").read_text().count(f"{name} starts") - 1
life = lives[min(number, len(lives) - 1)]
if life == "refuse":
    print("xllm-serve: error: it is not to be had", file=sys.stderr)
    sys.exit(2)
if life == "crash":
    sys.exit(3)
def end(*_):
    with (folder / "log").open("a") as log:
        print(f"{name} ends", file=log)
    if life != "stubborn":
        sys.exit(1 if life == "cut" else 0)
signal.signal(signal.SIGTERM, end)
registry = " registry=127.0.0.1:7" if name == "gateway" else ""
print(f"READY http=127.0.0.1:5 grpc=127.0.0.1:6{registry} startup_s=0.1", flush=True)
print("a line of its log", file=sys.stderr, flush=True)
if life == "die":
    os.kill(os.getpid(), signal.SIGKILL)
while True:
    time.sleep(60)
"""

SUPERVISOR = """
import asyncio, logging, sys
from xllm_compile.scheduler.launch.child import LocalChild
from xllm_compile.scheduler.launch.plan import Plan, ProcessPlan
from xllm_compile.scheduler.launch.supervisor import Supervisor, SupervisorConfig
folder, names = sys.argv[1], sys.argv[2].split(",")
class StandIn(ProcessPlan):
    @property
    def command(self):
        return (sys.executable, folder + "/stand_in.py", self.name, folder)
plans = [StandIn(name=name, arguments=(), environment={}) for name in names]
async def is_whole(gateway, num_instances):
    print("whole", gateway.registry, num_instances, flush=True)
config = SupervisorConfig(drain_timeout_s=1.0, first_pause_s=0.01, cut_s=0.5)
supervisor = Supervisor(Plan(gateway=plans[0], instances=tuple(plans[1:])), LocalChild.start, is_whole, config)
logging.basicConfig(level="INFO")
try:
    sys.exit(asyncio.run(supervisor.run(lambda ready: print("ready", ready.http_port, flush=True))))
except Exception as err:
    print(type(err).__name__, err, flush=True)
    sys.exit(9)
"""


class Run:
    """A supervisor and its processes; `lives` says by name what becomes of each."""

    def __init__(self, folder, lives):
        self._folder = folder
        (folder / "stand_in.py").write_text(STAND_IN)
        (folder / "supervisor.py").write_text(SUPERVISOR)
        for name, life in lives.items():
            (folder / name).write_text("\n".join(life))
        (folder / "log").touch()
        command = [sys.executable, str(folder / "supervisor.py"), str(folder), ",".join(lives)]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )

    def line(self):
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def log(self):
        return (self._folder / "log").read_text().splitlines()

    def processes(self):
        return [int(line.split()[-1]) for line in self.log() if "starts" in line]

    async def until(self, is_so):
        async with asyncio.timeout(60):
            while not is_so():
                await asyncio.sleep(0.02)

    def end(self, number=signal.SIGTERM):
        """(exit code, the rest of stdout, stderr) once it has ended."""
        if number is not None:
            self.process.send_signal(number)
        output, log = self.process.communicate(timeout=60)
        return self.process.returncode, output, log


@pytest.fixture
def start(tmp_path):
    runs = []

    def run(**lives):
        runs.append(Run(tmp_path, {name.replace("_", "-"): life for name, life in lives.items()}))
        return runs[-1]

    yield run
    for each in runs:
        if each.process.poll() is None:
            each.process.kill()
        each.process.communicate()


def is_running(pid):
    try:
        # A zombie has ended; nobody has asked how yet.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_up_in_order_one_line_and_down_in_order(start):
    run = start(gateway=["serve"], prefill_0=["serve"], decode_0=["serve"])
    assert run.line() == "whole 127.0.0.1:7 2"
    assert run.line() == "ready 5"
    assert run.log()[0].startswith("gateway starts")
    code, output, log = run.end()
    assert (code, output) == (0, "")
    ends = [line for line in run.log() if "ends" in line]
    assert ends[0] == "gateway ends"
    assert sorted(ends[1:]) == ["decode-0 ends", "prefill-0 ends"]
    assert "[prefill-0] a line of its log" in log
    assert "3 of 3 processes are ready" in log


async def test_who_dies_is_started_again(start):
    run = start(gateway=["die", "serve"], mix_0=["crash", "die", "crash", "crash", "serve"])
    assert run.line() == "whole 127.0.0.1:7 1"
    assert run.line() == "ready 5"
    await run.until(lambda: len(run.processes()) == 7)
    code, _, log = run.end()
    assert code == 0, log
    assert "mix-0 was killed by SIGKILL; starting it again" in log
    assert "mix-0 ended with exit code 3; starting it again" in log
    assert "gateway was killed by SIGKILL" in log


def test_who_never_comes_up_ends_it_all_with_the_reason(start):
    run = start(gateway=["serve"], mix_0=["serve"], mix_1=["crash"])
    code, output, _ = run.end(None)
    assert code == 9
    assert output.startswith("LaunchError mix-1 died 5 times in a row before it was ready; the last one ended")
    assert not any(map(is_running, run.processes()))


def test_the_users_mistake_is_said_once(start):
    run = start(gateway=["serve"], mix_0=["refuse"])
    code, output, _ = run.end(None)
    assert (code, output) == (9, "ValueError mix-0: it is not to be had\n")
    assert sum("mix-0 starts" in line for line in run.log()) == 1
    assert not any(map(is_running, run.processes()))


@pytest.mark.parametrize("life", ["cut", "stubborn"])
def test_requests_that_are_cut_show_in_the_exit_code(start, life):
    run = start(gateway=["serve"], mix_0=[life])
    assert run.line()
    assert run.line() == "ready 5"
    code, _, _ = run.end()
    assert code == 1
    assert not any(map(is_running, run.processes()))


async def test_a_second_signal_kills(start):
    run = start(gateway=["stubborn"], mix_0=["serve"])
    assert run.line()
    assert run.line() == "ready 5"
    run.process.send_signal(signal.SIGINT)
    await run.until(lambda: "gateway ends" in run.log())
    code, _, _ = run.end(signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    await run.until(lambda: not any(map(is_running, run.processes())))


async def test_kill_9_leaves_nobody_behind(start):
    run = start(gateway=["serve"], mix_0=["stubborn"], mix_1=["serve"])
    assert run.line()
    assert run.line() == "ready 5"
    run.process.kill()
    assert all(run.processes())
    await run.until(lambda: not any(map(is_running, run.processes())))
