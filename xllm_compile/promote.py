"""The build process of a serving instance: compile one size of an artifact into the graph store.

``python -m xllm_compile.promote ARTIFACT --tokens N --store DIR``; runtime/promotion.py starts it. It gives way to
everything else on the machine, and its result is checked against the eager programs before anybody is told of it.
"""

import ctypes
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import click

from xllm_compile.runtime.program import RegionProgram, concrete_shape
from xllm_compile.runtime.promotion import NO_COMPILER, write_entry

_PR_SET_PDEATHSIG = 1
_NEEDED_BYTES = 1 << 30


@click.command()
@click.argument("root", type=click.Path(path_type=Path))
@click.option("--tokens", type=click.IntRange(1), required=True)
@click.option("--store", type=click.Path(path_type=Path), required=True)
def main(root: Path, tokens: int, store: Path) -> None:
    """Exit code 0: compiled, or found. NO_COMPILER: nothing can be compiled here. 2: this size cannot."""
    _give_way()
    from xllm_compile.runtime.ops.native import CompilerNotFoundError
    from xllm_compile.runtime.resources import available_memory_bytes

    try:
        if available_memory_bytes() < _NEEDED_BYTES:
            raise ValueError(f"compiling needs {_NEEDED_BYTES >> 20} MiB of free memory")
        promote(root, tokens, store)
    except CompilerNotFoundError as err:
        _fail(err, NO_COMPILER)
    except (ValueError, OSError, RuntimeError) as err:
        _fail(err, 2)


def promote(root: Path, num_tokens: int, store_root: Path) -> None:
    """Have the graphs of ``num_tokens`` in the store, and note them for this artifact's build.

    Raises ValueError for an artifact that cannot be served here or a graph that computes something else than its
    program, and what compiling raises.
    """
    from xllm_compile.graph_jobs import bucket_sizes, graph_job
    from xllm_compile.graph_store import GraphStore
    from xllm_compile.runtime.artifact import check_artifact, cpu_kernels, read_manifest
    from xllm_compile.runtime.ops import native
    from xllm_compile.targets import lowering_for

    manifest = read_manifest(root)
    lowering = lowering_for(manifest.target)
    lowering.check()
    check_artifact(root, manifest, lowering.features())
    native.load_kernels(root / cpu_kernels(root, manifest).path)
    store = GraphStore(store_root)
    store_root.mkdir(parents=True, exist_ok=True)
    files = {}
    with tempfile.TemporaryDirectory(dir=store_root, prefix=".promote-") as scratch:
        lowering.initialise_worker(Path(scratch))
        for program in manifest.programs:
            if program.is_eager or not program.layers:
                continue
            job = graph_job(program, bucket_sizes(program, num_tokens), lowering)
            if store.find(job.key) is None:
                output = Path(scratch) / store.path(job.key).name
                lowering.compile_program(program, job.sizes, output)
                check_graph(program, job.sizes, output)
                os.replace(output, store.path(job.key))
            files[program.name] = store.path(job.key).name
    if not files:
        raise ValueError(f"{root} has no compiled layers: it was built with --graph-mode {manifest.graph_mode}")
    write_entry(store_root, manifest.build_key, num_tokens, files)


def check_graph(program: RegionProgram, sizes: Mapping[str, int], path: Path) -> None:
    """Run the graph and its program on the same random tensors. Raises ValueError when they differ."""
    import torch

    from xllm_compile.runtime.compiled_graph import CompiledGraph
    from xllm_compile.runtime.ops.kv_rows import read_rows

    known = {"S": 1, "S1": 2, **sizes, "L": 1, "M": sizes["T"]}
    generator = torch.Generator().manual_seed(0)

    def random(shape: Sequence[int], dtype: str) -> torch.Tensor:
        # Small, so that products of any length stay finite.
        return (torch.rand(list(shape), generator=generator) * 0.1).to(getattr(torch, dtype))

    tensors = [random(concrete_shape(spec, known), spec.dtype) for spec in program.inputs]
    tensors += [random(spec.shape, spec.dtype) for spec in program.weights]
    for spec, tensor in zip(program.inputs, tensors, strict=False):
        # One sequence of all the tokens, the rest empty.
        if spec.name == "positions":
            tensor.copy_(torch.arange(sizes["T"]))
        elif spec.name == "seq_start":
            tensor[1:] = sizes["T"]
        elif spec.name == "context_len":
            tensor[0] = sizes["T"]
    given = [[tensor.clone() for tensor in tensors] for _ in range(2)]
    found, expected = CompiledGraph(path)(given[0]), program.load()(*given[1])
    for spec, *rows in zip(program.inputs, *given, strict=False):
        if spec.name == "kv_cache" and spec.dtype == "int8":
            # A last bit before a row is rounded may move its codes by one.
            ours, theirs = (read_rows(each) for each in rows)
            if (ours - theirs).abs().max() <= 1.01 * theirs.abs().max() / 127:
                rows[0].copy_(rows[1])
    try:
        for ours, theirs in zip([*found, *given[0]], [*expected, *given[1]], strict=True):
            torch.testing.assert_close(ours, theirs)
    except AssertionError as err:
        raise ValueError(f"the graph of {program.name} differs from its program: {err}") from err


def _give_way() -> None:
    """Run only where nobody else would, and not beyond the server's life."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.nice(19)
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    import warnings

    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)


def _fail(err: Exception, code: int) -> NoReturn:
    click.echo(" ".join(str(err).split()), err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
