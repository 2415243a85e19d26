"""Hosts that reach each other, and do not."""

import socket
import subprocess
import sys
import time

import pytest

from xllm_compile.benchmarks.host_network import HostNetwork, missing_for_network

pytestmark = pytest.mark.skipif(bool(missing_for_network()), reason=missing_for_network())

_ECHO = """
import socket
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("0.0.0.0", 9))
print(flush=True)
while True:
    data, sender = server.recvfrom(64)
    server.sendto(data, sender)
"""
_ASK = """
import socket, sys
client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
client.settimeout(0.2)
client.connect((sys.argv[1], 9))
client.send(b"x")
client.recv(64)
"""


@pytest.fixture
def network():
    with HostNetwork() as network:
        yield network


@pytest.fixture
def echo():
    started = []

    def start(host):
        process = subprocess.Popen([*host.command, sys.executable, "-c", _ECHO], stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        process.stdout.readline()

    yield start
    for process in started:
        process.kill()
        process.communicate()


def answers(source, target):
    command = [*source.command, sys.executable, "-c", _ASK, target.address]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_cut_drops_one_way_between_two_hosts_until_it_heals(network, echo):
    a, b, c = (network.add(name) for name in "abc")
    for host in (a, b, c):
        echo(host)
    assert answers(a, b) and answers(b, a) and answers(c, a)
    network.cut(a, b)
    network.cut(a, b)
    assert not answers(a, b)
    assert not answers(b, a), "the answer goes from a to b"
    assert answers(a, c) and answers(b, c) and answers(c, a)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(5)
        client.connect((a.address, 9))
        client.send(b"x")
        assert client.recv(64) == b"x"
    network.heal()
    assert answers(a, b) and answers(b, a)


def test_nothing_is_left_when_its_process_is_killed():
    code = (
        "from xllm_compile.benchmarks.host_network import HostNetwork\n"
        "import subprocess, sys\n"
        "with HostNetwork() as network:\n"
        "    host = network.add('a')\n"
        "    child = subprocess.Popen([*host.command, 'sleep', 'infinity'])\n"
        "    print(child.pid, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    child = int(owner.stdout.readline())
    assert f"xllm{owner.pid}" in _links()
    owner.kill()
    owner.communicate()
    deadline = time.monotonic() + 30
    while f"xllm{owner.pid}" in _links() or _is_alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _links():
    return subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout


def _is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
