"""Makes what a plan asks for: graphs by worker processes while the weights are written, linked into the artifact."""

import shutil
from collections.abc import Sequence
from concurrent.futures import Future, as_completed
from pathlib import Path

import torch

from xllm_compile.build_config import BuildConfig
from xllm_compile.build_error import BuildError
from xllm_compile.build_plan import BuildPlan, Source
from xllm_compile.capture import locate_operator
from xllm_compile.graph_store import GraphStore, graph_key, link_or_copy
from xllm_compile.machine import cache_dir, free_disk_bytes
from xllm_compile.models.decoder import build_regions, pool_region
from xllm_compile.models.rope import rope_constants
from xllm_compile.progress import BuildProgress
from xllm_compile.runtime import artifact
from xllm_compile.runtime.ops import native
from xllm_compile.runtime.ops.spec import WeightSpec
from xllm_compile.runtime.resources import available_memory_bytes, num_cpus
from xllm_compile.targets import UnsupportedOperatorError, lowering_for
from xllm_compile.weight_builder import build_weights, num_bytes, weights_key
from xllm_compile.workers import build_kernels, compile_graph, stop_workers, worker_pool

_WORKER_BYTES = 900 << 20


def open_store(output: Path, suffix: str) -> GraphStore:
    """The user's graph cache, which also finds the graphs of the artifact about to be replaced."""
    store = GraphStore(cache_dir() / "graphs", suffix)
    try:
        store.root.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise BuildError(
            f"cannot write the graph cache {store.root} ({err}); set XDG_CACHE_HOME to a folder you own"
        ) from err
    if artifact.is_artifact(output):
        try:
            for entry in artifact.read_manifest(output).graphs:
                if artifact.is_intact(output, entry.file):
                    store.adopt(entry.key, output / entry.file.path)
        except artifact.ArtifactMismatchError:
            pass  # A damaged artifact has nothing to give; it is replaced whole.
    return store


def check_resources(config: BuildConfig, weights: Sequence[WeightSpec], num_graphs: int) -> int:
    """Number of workers that fit. Raises BuildError when disk or memory cannot hold the build."""
    sizes = [num_bytes(spec) for spec in weights]
    disk_needed = config.tensor_parallel_size * sum(sizes) + num_graphs * (2 << 20)
    disk_free = free_disk_bytes(config.output.parent)
    if disk_free < disk_needed:
        raise BuildError(
            f"{config.output} needs {disk_needed >> 20} MiB, {disk_free >> 20} MiB are free there;"
            " free some space or choose another -o"
        )
    memory_needed = max(map(_bytes_while_made, weights)) + _WORKER_BYTES
    memory_free = available_memory_bytes()
    if memory_free < memory_needed:
        raise BuildError(
            f"the build needs about {memory_needed >> 20} MiB of memory, {memory_free >> 20} MiB are free;"
            " stop other processes or compile on a larger machine"
        )
    affordable = 1 + (memory_free - memory_needed) // _WORKER_BYTES
    return int(min(config.jobs or num_cpus(), affordable, num_graphs + 1))


def produce(
    root: Path,
    plan: BuildPlan,
    store: GraphStore,
    num_workers: int,
    progress: BuildProgress,
) -> int:
    """Compile what is missing while the weights are written, and link all of it into the artifact.

    Returns how many graphs were compiled.
    """
    config, source, jobs = plan.config, plan.source, plan.jobs
    lowering = lowering_for(config.target)
    kernels_key = graph_key(["kernels", native.kernel_source_hash(), torch.__version__, lowering.compiler_version()])
    missing = {job.key: job for job in jobs if store.find(job.key) is None}
    scratch = root / ".scratch"
    scratch.mkdir()
    progress.start("graphs", len(jobs))
    progress.advance("graphs", len(jobs) - len(missing))
    with worker_pool(config.target, num_workers, scratch) as pool:
        futures: dict[Future[None], str] = {}
        regions: dict[Future[None], str] = {}
        if lowering.has_kernels and store.find(kernels_key) is None:
            futures[pool.submit(build_kernels, config.target, str(store.path(kernels_key)))] = "kernels"
        for job in missing.values():
            output = str(store.path(job.key))
            future = pool.submit(compile_graph, config.target, job.program.to_json(), job.sizes, output)
            futures[future] = job.file
            regions[future] = job.program.name
        try:
            place_weights(root, config.output, source, plan.weights, progress)
            for future in as_completed(futures):
                try:
                    future.result()
                except UnsupportedOperatorError as err:
                    raise BuildError(_unsupported(config.target, source, regions[future], err)) from err
                if futures[future] != "kernels":
                    progress.advance("graphs")
        except BaseException:
            stop_workers(pool)
            raise
    for job in jobs:
        link_or_copy(_found(store, job.key), root / job.file)
    if lowering.has_kernels:
        link_or_copy(_found(store, kernels_key), root / artifact.KERNELS)
    shutil.rmtree(scratch)
    return len(missing)


def _unsupported(target: str, source: Source, region_name: str, error: UnsupportedOperatorError) -> str:
    # The pieces of a partial graph are named after their region.
    all_regions = [*build_regions(source.config, source.tensor_parallel_size), pool_region(source.config)]
    regions = sorted(all_regions, key=lambda region: len(region.name))
    region = next(region for region in reversed(regions) if region_name.startswith(region.name))
    operator = error.operators[0]
    place = locate_operator(region, getattr(torch, source.dtype), operator)
    return (
        f"region {region_name} uses {operator}{f' ({place})' if place else ''}, which the {target} target cannot lower;"
        " write it with operators it has, or add one with a kernel to runtime/ops"
    )


def _found(store: GraphStore, key: str) -> Path:
    path = store.find(key)
    if path is None:
        raise BuildError(f"graph {key} vanished from {store.root} while building; run the build again")
    return path


def place_weights(
    root: Path, previous: Path, source: Source, weights: Sequence[WeightSpec], progress: BuildProgress
) -> None:
    """Write each rank's weights file, or link the previous artifact's when they are the same."""
    num_ranks = source.tensor_parallel_size
    total = num_ranks * sum(num_bytes(spec) for spec in weights)
    computed = rope_constants(source.config)
    key = weights_key(source.checkpoint_hash, weights, computed, source.stored)
    progress.start("weights", total)
    if artifact.is_artifact(previous):
        try:
            manifest = artifact.read_manifest(previous)
            intact = all(artifact.is_intact(previous, entry) for entry in manifest.weights)
            if manifest.weights_key == key and len(manifest.weights) == num_ranks and intact:
                for entry in manifest.weights:
                    link_or_copy(previous / entry.path, root / entry.path)
                progress.advance("weights", total)
                return
        except artifact.ArtifactMismatchError:
            pass  # Written anew below.
    for rank in range(num_ranks):
        path = root / artifact.weights_path(rank, num_ranks)
        build_weights(
            path,
            source.checkpoint,
            computed,
            weights,
            lambda done: progress.advance("weights", done),
            rank=rank,
            stored=source.stored,
        )


def _bytes_while_made(spec: WeightSpec) -> int:
    """A tensor is held as read, converted and packed while it is written; one to be rounded as four float32."""
    if not spec.quantised:
        return 3 * num_bytes(spec)
    elements = num_bytes(spec) * (2 if spec.quantised == "int4" else 1)
    return 16 * elements
