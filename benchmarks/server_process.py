"""xllm-serve as a child process: started as a user starts it, watched from outside."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from xllm_compile.benchmarks.child_process import ChildProcess
from xllm_compile.benchmarks.load import process_tree


class ServerProcess(ChildProcess):
    """Starts the server on free ports. ``wait_ready`` comes first."""

    def __init__(
        self, artifact: Path, options: Sequence[str] = (), *, prefix: Sequence[str] = (), log: Path | None = None
    ) -> None:
        """prefix: a command that runs the server's in its own process. log: what it says is appended there."""
        command = [*prefix, sys.executable, "-m", "xllm_compile.scheduler.serve", str(artifact)]
        super().__init__([*command, "--port", "0", "--grpc-port", "0", *options], log=log, has_stdout=True)
        self.host, self.port = "127.0.0.1", 0
        self.registry = ""
        """Where a gateway serves its own."""
        self.startup_s = 0.0
        """What the server says of its own start, in the ready line."""
        self.ready_s = 0.0
        """From the start of the process to the ready line."""

    def wait_ready(self) -> None:
        """Block until the ready line. Raises RuntimeError with the server's message when there is none."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.ready_s = time.monotonic() - self.started
        if not line.startswith("READY "):
            self.process.wait()
            raise RuntimeError(f"xllm-serve did not start:\n{self.last_words()}")
        fields = dict(field.split("=", 1) for field in line.split()[1:])
        self.host, _, port = fields["http"].rpartition(":")
        self.port = int(port)
        self.startup_s = float(fields["startup_s"])
        self.registry = fields.get("registry", "")

    def wait(self) -> None:
        """Until it has ended."""
        self.process.wait()

    def memory(self) -> dict[str, int]:
        """Bytes of the server and its children: rss, pss, and of rss the parts rss_anon, rss_file and rss_shmem."""
        total = dict.fromkeys(("rss", "pss", "rss_anon", "rss_file", "rss_shmem"), 0)
        for pid in process_tree(self.pid):
            found = process_memory(pid)
            for key in total:
                total[key] += found.get(key, 0)
        return total


def process_memory(pid: int) -> dict[str, int]:
    """Bytes, from /proc/PID/status and smaps_rollup; empty when the process has ended."""
    names = {
        "VmRSS": "rss",
        "VmHWM": "rss_peak",
        "RssAnon": "rss_anon",
        "RssFile": "rss_file",
        "RssShmem": "rss_shmem",
        "Pss": "pss",
    }
    found = {}
    try:
        text = Path(f"/proc/{pid}/status").read_text() + Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key in names:
            found[names[key]] = int(value.split()[0]) * 1024
    return found


def import_seconds(module: str) -> float:
    """Seconds of a fresh interpreter that imports the module and ends."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True, env=dict(os.environ))
    return time.monotonic() - began
