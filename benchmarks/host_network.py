"""Hosts on one machine: each a network namespace with an address of its own, joined by a router that drops on demand.

Nothing has a name in the system. A namespace lives as long as the processes in it, and those die with this one, so
nothing is left behind, however this process ends.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

_TOOLS = {"ip": "iproute2", "nsenter": "util-linux", "setpriv": "util-linux", "unshare": "util-linux"}
_NETWORKS = [f"10.{number}" for number in range(200, 250)]
"""The first two numbers of addresses. A network takes the first that is free."""
_DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")
"""It follows the thread that starts the process, so hosts and their processes are started by the main one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    name: str
    network: str
    index: int
    command: tuple[str, ...]
    """Before a command that is to run there. The process's id is the command's own."""

    @property
    def address(self) -> str:
        return f"{self.network}.{self.index}.2"

    @property
    def subnet(self) -> str:
        return f"{self.network}.{self.index}.0/24"


def missing_for_network() -> str:
    """Why there can be no HostNetwork here; empty where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool, package in _TOOLS.items():
        if shutil.which(tool) is None:
            return f"{tool} not found; install {package} (Debian: apt-get install {package})"
    return ""


class HostNetwork:
    """Context manager. This process reaches all hosts and is reached by them, whatever is cut."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._num_hosts = 0
        self._cuts: set[tuple[Host, Host]] = set()

    def __enter__(self) -> Self:
        """Raises RuntimeError where the system does not allow it."""
        if missing := missing_for_network():
            raise RuntimeError(missing)
        with ExitStack() as stack:
            self._router = stack.enter_context(_Namespace())
            self._router.run("sysctl", "-q", "-w", "net.ipv4.ip_forward=1")
            # This process is on the subnet with index 0.
            end = f"xllm{os.getpid()}"
            self._router.ip("link", "add", "p0", "type", "veth", "peer", "name", end, "netns", str(os.getpid()))
            stack.callback(subprocess.run, ["ip", "link", "del", end], capture_output=True, check=False)
            _system("ip", "link", "set", end, "up")
            self._network = _take_network(end)
            _system("ip", "addr", "add", f"{self._network}.0.2/24", "dev", end)
            self._router.ip("addr", "add", f"{self._network}.0.1/24", "dev", "p0")
            self._router.ip("link", "set", "p0", "up")
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def add(self, name: str) -> Host:
        space = self._stack.enter_context(_Namespace())
        self._num_hosts += 1
        host = Host(name=name, network=self._network, index=self._num_hosts, command=(*_DIES_WITH_US, *space.command))
        gateway = f"{self._network}.{host.index}.1"
        end = f"p{host.index}"
        self._router.ip("link", "add", end, "type", "veth", "peer", "name", "eth0", "netns", str(space.pid))
        self._router.ip("addr", "add", f"{gateway}/24", "dev", end)
        self._router.ip("link", "set", end, "up")
        space.ip("addr", "add", f"{host.address}/24", "dev", "eth0")
        space.ip("link", "set", "lo", "up")
        space.ip("link", "set", "eth0", "up")
        space.ip("route", "add", "default", "via", gateway)
        return host

    def cut(self, source: Host, target: Host) -> None:
        """Drop what source sends to target, without a word. The other way stays open."""
        if (source, target) not in self._cuts:
            self._router.ip("rule", "add", *_dropped(source, target))
            self._cuts.add((source, target))

    def heal(self) -> None:
        """Nothing is cut any more."""
        for source, target in self._cuts:
            self._router.ip("rule", "del", *_dropped(source, target))
        self._cuts.clear()


class _Namespace:
    """Held by a process that does nothing."""

    def __enter__(self) -> Self:
        self._holder = subprocess.Popen([*_DIES_WITH_US, "unshare", "--net", "sleep", "infinity"])
        self.pid = self._holder.pid
        self.command = ("nsenter", f"--net=/proc/{self.pid}/ns/net")
        own = os.readlink("/proc/self/ns/net")
        while os.readlink(f"/proc/{self.pid}/ns/net") == own:
            if self._holder.poll() is not None:
                raise RuntimeError("network namespaces are not allowed here; run it as root outside of a container")
            time.sleep(0.001)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._holder.kill()
        self._holder.wait()

    def run(self, *command: str) -> None:
        _system(*self.command, *command)

    def ip(self, *arguments: str) -> None:
        self.run("ip", *arguments)


def _take_network(link: str) -> str:
    """Of several processes that try one gets the route."""
    for network in _NETWORKS:
        route = ["ip", "route", "add", f"{network}.0.0/16", "via", f"{network}.0.1", "dev", link, "onlink"]
        if subprocess.run(route, capture_output=True, check=False).returncode == 0:
            return network
    raise RuntimeError(f"none of the networks {_NETWORKS[0]} to {_NETWORKS[-1]} is free")


def _dropped(source: Host, target: Host) -> Sequence[str]:
    return ("from", source.subnet, "to", target.subnet, "blackhole")


def _system(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
