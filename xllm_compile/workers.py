"""Build work in processes of its own: each imports its compiler once, compiles many graphs, and dies with the build."""

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1


@contextmanager
def worker_pool(target: str, jobs: int, scratch: Path) -> Iterator[ProcessPoolExecutor]:
    """``jobs`` processes that compile for ``target``; ``scratch`` holds what its compiler leaves behind, shared
    between them."""
    from xllm_compile.targets import lowering_for

    pool = ProcessPoolExecutor(
        jobs,
        # A fresh interpreter: the parent has threads (progress bar, OpenMP) that do not survive a fork.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_initialise,
        initargs=(target, str(scratch), os.getpid()),
    )
    # Handed down by inheritance: the dynamic linker reads it before a worker's first line of Python.
    with _environment(lowering_for(target).worker_environment()), pool:
        yield pool


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    previous = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def stop_workers(pool: ProcessPoolExecutor) -> None:
    """End the pool without waiting for what is being compiled."""
    # ProcessPoolExecutor.kill_workers from Python 3.14 on.
    for process in list((pool._processes or {}).values()):
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)


def _initialise(target: str, scratch: str, parent: int) -> None:
    # The pool's other threads keep the queue open when the parent is killed: ask the kernel to end us with it.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.getppid() != parent:
        sys.exit(1)
    logging.disable(logging.WARNING)
    import warnings

    warnings.simplefilter("ignore")
    from xllm_compile.targets import lowering_for

    lowering_for(target).initialise_worker(Path(scratch))


def compile_graph(target: str, program_json: Mapping[str, Any], sizes: Mapping[str, int], output: str) -> None:
    """Job: one region for one bucket."""
    from xllm_compile.runtime.program import RegionProgram
    from xllm_compile.targets import lowering_for

    lowering_for(target).compile_program(RegionProgram.from_json(program_json), sizes, Path(output))


def build_kernels(target: str, output: str) -> None:
    """Job: the target's kernels of the operators."""
    from xllm_compile.targets import lowering_for

    lowering_for(target).build_kernels(Path(output))
