"""Starts xllm-serve as users do, on ports the system picks, and ends it by its own id."""

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import httpx

READY = re.compile(r"READY http=(\S+):(\d+) grpc=(\S+):(\d+)(?: registry=(\S+))? startup_s=(\d+\.\d+)\n")


class ServeProcess:
    """A running server. A context manager: leaving it kills whatever still runs."""

    def __init__(self, artifact: Path, *options: str) -> None:
        self.process = subprocess.Popen(
            serve_command(artifact, "--port", "0", "--grpc-port", "0", *options),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log: list[str] = []
        # A full pipe would stop the server.
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        assert self.process.stdout is not None
        ready = READY.fullmatch(self.process.stdout.readline())
        if ready is None:
            self.process.kill()
            self.process.wait()
            self._reader.join()
            raise RuntimeError("no ready line; log:\n" + "".join(self.log))
        self.http = f"http://{ready[1]}:{ready[2]}"
        self.host, self.http_port = ready[1], int(ready[2])
        self.grpc = f"{ready[3]}:{ready[4]}"
        self.registry = ready[5]

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(self.process.stderr)

    def __enter__(self) -> "ServeProcess":
        return self

    def __exit__(self, *_error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        return self.process.wait(timeout=600)

    def metrics(self) -> dict[str, float]:
        text = httpx.get(f"{self.http}/metrics").text
        lines = (line for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def serve_command(artifact: Path, *options: str) -> Sequence[str]:
    return [sys.executable, "-m", "xllm_compile.scheduler.serve", str(artifact), *options]


def run_refused(artifact: Path, *options: str) -> str:
    """The one line of a server that refuses to start."""
    done = subprocess.run(serve_command(artifact, *options), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    line = done.stderr.splitlines()[-1]
    assert line.startswith("xllm-serve: error: ")
    assert "Traceback" not in done.stderr
    return line
