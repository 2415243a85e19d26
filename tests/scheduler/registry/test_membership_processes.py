"""An instance that is a process, etcd that is one too: each is killed and comes back, and the view is right again."""

import asyncio
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.scheduler.registry.test_etcd_registry import client
from tests.scheduler.registry.test_membership import until
from xllm_compile.benchmarks.child_process import free_port
from xllm_compile.scheduler.registry.liveness import LivenessConfig
from xllm_compile.scheduler.registry.membership import Membership

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[3]


@contextmanager
def instance_process(etcd, port, incarnation):
    command = [sys.executable, "-m", "tests.scheduler.registry.instance_process", etcd.endpoint, str(port), incarnation]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def test_kills_and_returns(etcd):
    port = free_port()
    config = LivenessConfig(probe_period_s=0.1, removal_s=1.0)
    async with client(etcd.endpoint) as registry, Membership(registry, config=config) as members:
        with instance_process(etcd, port, "1") as process:
            await until(members, ("a", "1", "active"))
            view = members.view
            etcd.kill()
            await asyncio.to_thread(etcd.start)
            # The lease outlived etcd; and the watch goes on, as the next steps show.
            await registry.snapshot("")
            assert members.view is view
            process.send_signal(signal.SIGKILL)
            members.doubt("a", "1")
            await until(members, ("a", "1", "suspect"))
        with instance_process(etcd, port, "2") as process:
            await until(members, ("a", "2", "active"))
            # Goodbye, in order: nobody has to wait for the end of a lease.
            process.stdin.close()
            await until(members)
            assert process.wait(20) == 0
