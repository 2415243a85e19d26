"""The ranks above 0 of a tensor-parallel instance: a process each, started by rank 0 and gone with it."""

import argparse
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from xllm_compile.runtime.artifact import read_manifest
from xllm_compile.runtime.instance import Instance, check_group, load_artifact_kernels, open_instance, open_runner
from xllm_compile.runtime.instance_config import InstanceConfig
from xllm_compile.runtime.kv_cache import KVCache
from xllm_compile.runtime.kv_cache_config import KVCacheConfig
from xllm_compile.runtime.memory.page_ops import replay
from xllm_compile.runtime.tensor_parallel import RankConfig, RankGroup, ReleaseMemory
from xllm_compile.runtime.weights import map_weights, release_weights

_PR_SET_PDEATHSIG = 1
_STOP_TIMEOUT_S = 5.0


@contextmanager
def opened_instance(root: Path, config: InstanceConfig | None = None) -> Iterator[Instance]:
    """The artifact at ``root``, opened with as many processes on this machine as it has ranks.

    Raises what open_instance raises; RuntimeError naming the rank when a follower does not come up.
    """
    size = read_manifest(root).tensor_parallel_size
    if size == 1:
        yield from _opened(root, config)
        return
    group = RankGroup(RankConfig(rank=0, world_size=size))
    followers = [_start(root, rank, size, group.address) for rank in range(1, size)]
    try:
        yield from _opened(root, config, group)
    finally:
        group.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in followers:
                process.wait(_STOP_TIMEOUT_S)
        for process in followers:
            process.kill()
            process.wait()


def _opened(root: Path, config: InstanceConfig | None, group: RankGroup | None = None) -> Iterator[Instance]:
    instance = open_instance(root, config, group)
    try:
        yield instance
    finally:
        # Before the ranks part: a step may still be under way.
        instance.engine.close()


def _start(root: Path, rank: int, size: int, address: str) -> "subprocess.Popen[bytes]":
    arguments = [str(root), str(rank), str(size), address, str(os.getpid())]
    return subprocess.Popen([sys.executable, "-m", "xllm_compile.runtime.follower", *arguments])


def follow(root: Path, group: RankGroup) -> None:
    """Run the steps of rank 0 on this rank's part of the artifact, until rank 0 closes the group.

    Raises what open_instance raises, RuntimeError when rank 0 is gone.
    """
    manifest = read_manifest(root)
    check_group(root, manifest, group)
    published = group.published()
    config = InstanceConfig(**published["config"])
    load_artifact_kernels(root, manifest, config)
    values = published["kv_cache"]
    kv_cache = KVCache(KVCacheConfig(**{**values, "dtype": getattr(torch, values["dtype"])}))
    weights_file = root / manifest.weights[group.config.rank].path
    weights = map_weights(weights_file)
    runner = open_runner(root, manifest, weights, kv_cache, config)
    group.connect()
    if config.warm_up:
        runner.warm_up()
    while (message := group.receive()) is not None:
        if isinstance(message, ReleaseMemory):
            # Where pages are mapped does not matter: rank 0 unmaps them with the next step.
            kv_cache.give_back()
            release_weights(weights, weights_file, from_cache=message.from_cache)
            continue
        replay(message.page_ops, kv_cache.xtensor)
        runner.execute(message)
    group.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="A rank of a tensor-parallel instance; started by rank 0.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("rank", type=int)
    parser.add_argument("world_size", type=int)
    parser.add_argument("address", help="host:port where rank 0 listens")
    parser.add_argument("parent", type=int, help="process id of rank 0")
    args = parser.parse_args()
    # However rank 0 ends, this process does not outlive it. Interrupts from the terminal are for rank 0 to handle.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.getppid() != args.parent:
        sys.exit(1)
    follow(args.artifact, RankGroup(RankConfig(rank=args.rank, world_size=args.world_size, address=args.address)))


if __name__ == "__main__":
    main()
