"""Build work in processes of its own: each imports inductor once, compiles many graphs, and dies with the build."""

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1


def worker_pool(jobs: int, scratch: Path) -> ProcessPoolExecutor:
    """``jobs`` processes; ``scratch`` holds what inductor leaves behind, shared between them."""
    return ProcessPoolExecutor(
        jobs,
        # A fresh interpreter: the parent has threads (progress bar, OpenMP) that do not survive a fork.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_initialise,
        initargs=(str(scratch), os.getpid()),
    )


def stop_workers(pool: ProcessPoolExecutor) -> None:
    """End the pool without waiting for what is being compiled."""
    # ProcessPoolExecutor.kill_workers from Python 3.14 on.
    for process in list((pool._processes or {}).values()):
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)


def _initialise(scratch: str, parent: int) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = scratch
    # The pool's other threads keep the queue open when the parent is killed: ask the kernel to end us with it.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.getppid() != parent:
        sys.exit(1)
    logging.disable(logging.WARNING)
    import warnings

    warnings.simplefilter("ignore")
    import torch

    # Each worker compiles for itself; inductor's own pool of compile processes would only add more.
    torch.set_num_threads(1)
    from torch._inductor import config

    config.compile_threads = 1


def compile_graph(program_json: Mapping[str, Any], sizes: Mapping[str, int], output: str) -> None:
    """Job: one region for one bucket. See targets.cpu.compile_program."""
    from xllm_compile.runtime.program import RegionProgram
    from xllm_compile.targets.cpu import compile_program

    compile_program(RegionProgram.from_json(program_json), sizes, Path(output))


def build_kernels(output: str) -> None:
    """Job: the CPU kernels of the operators."""
    from xllm_compile.runtime.ops import native

    native.build_kernels(Path(output))
