"""A real etcd, on loopback or on a host of a HostNetwork."""

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import Self

from xllm_compile.benchmarks.child_process import free_port
from xllm_compile.benchmarks.host_network import Host

ETCD = shutil.which("etcd")
MISSING = "etcd is not installed (Debian: etcd-server)"


class EtcdProcess:
    """start, kill -9, start again on the same data and ports."""

    def __init__(self, folder: Path, name: str = "n0", host: Host | None = None) -> None:
        self._folder = folder
        self._name = name
        self._prefix = () if host is None else host.command
        self._address = "127.0.0.1" if host is None else host.address
        self.port, self._peer_port = free_port(), free_port()
        self.heartbeat_ms = 20
        """Members of a cluster take ten that they miss for their leader's end: more on a busy machine."""
        self._cluster: tuple[EtcdProcess, ...] = (self,)
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def cluster(cls, folder: Path, size: int, hosts: Sequence[Host] = ()) -> tuple[Self, ...]:
        """Members of one cluster, on hosts of their own if given. None is ready until most of them are launched."""
        names = [f"n{index}" for index in range(size)]
        members = tuple(cls(folder / name, name, host) for name, host in zip_longest(names, hosts))
        for member in members:
            member._cluster = members
        return members

    @property
    def endpoint(self) -> str:
        return f"{self._address}:{self.port}"

    def start(self) -> None:
        """Returns when the port accepts connections."""
        self.launch()
        self.wait_ready()

    def launch(self) -> None:
        if ETCD is None:
            raise FileNotFoundError(MISSING)
        self._folder.mkdir(parents=True, exist_ok=True)
        client = f"http://{self.endpoint}"
        command = [
            *self._prefix,
            ETCD,
            "--name",
            self._name,
            "--data-dir",
            str(self._folder / "data"),
            "--log-level",
            "warn",
        ]
        command += ["--listen-client-urls", client, "--advertise-client-urls", client]
        command += ["--listen-peer-urls", self._peer_url, "--initial-advertise-peer-urls", self._peer_url]
        command += ["--initial-cluster", ",".join(f"{member._name}={member._peer_url}" for member in self._cluster)]
        # Leases may then be as short as a second.
        command += ["--heartbeat-interval", str(self.heartbeat_ms), "--election-timeout", str(10 * self.heartbeat_ms)]
        with open(self._folder / "log", "ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

    def wait_ready(self, timeout_s: float = 30.0) -> None:
        """Raises RuntimeError with etcd's log when it ended or took too long."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                socket.create_connection((self._address, self.port), timeout=1).close()
                return
            except OSError:
                is_over = self._process is None or self._process.poll() is not None
                if is_over or time.monotonic() > deadline_s:
                    raise RuntimeError(f"etcd did not start: {(self._folder / 'log').read_text()}") from None
                time.sleep(0.01)

    @property
    def _peer_url(self) -> str:
        return f"http://{self._address}:{self._peer_port}"

    def kill(self) -> None:
        """kill -9, if it runs."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
