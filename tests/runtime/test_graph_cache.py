"""Which graph runs a step, and that each of them computes what the eager program does."""

import logging
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.runtime.graphs import TIMES, cache, compiled_runner, graph, program, step_of
from xllm_compile.runtime.artifact import read_manifest
from xllm_compile.runtime.compiled_graph import CompiledGraph
from xllm_compile.runtime.graph_cache import GraphCache, GraphChoice, build_cache


def broken(tensors):
    raise RuntimeError("out of luck")


def outcomes(graphs):
    return {found: count for found, count in graphs.counts.items() if count}


@pytest.mark.parametrize(
    ("size", "outcome", "padded_to", "reason"),
    [
        # Padding is cheaper than the dynamic graph up to a tenth of the cost.
        (1, "exact", 1, "bucket"),
        (2, "padded", 4, "padding_pays"),
        (3, "padded", 4, "padding_pays"),
        (4, "exact", 4, "bucket"),
        (5, "dynamic", 5, "padding_too_dear"),
        (56, "dynamic", 56, "padding_too_dear"),
        (57, "padded", 64, "padding_pays"),
        (63, "padded", 64, "padding_pays"),
        (64, "exact", 64, "bucket"),
        (65, "dynamic", 65, "above_buckets"),
    ],
)
def test_choices(size, outcome, padded_to, reason):
    graphs = cache(1, 4, 64)
    assert graphs.choose(size) == GraphChoice(outcome=outcome, size=padded_to, reason=reason)
    assert outcomes(graphs) == {(outcome, reason): 1}
    assert graphs.demand == {size: 1}


def test_padding_is_chosen_where_it_costs_less():
    graphs = cache(1, 4, 16, 64, 512)
    for size in range(1, 513):
        choice = graphs.choose(size)
        bucket = min(b for b in graphs.buckets if b >= size)
        dynamic = TIMES.of(size) * 1.1
        assert (choice.outcome == "dynamic") == (bucket != size and TIMES.of(bucket) > dynamic)
        assert choice.size == (size if choice.outcome == "dynamic" else bucket)
    assert sum(graphs.counts.values()) == 512 and graphs.counts["exact", "bucket"] == 5


def run(graphs, region, size):
    return graphs.run(region, graphs.choose(size), [torch.tensor(21)])


def test_the_graph_of_a_choice():
    graphs = cache(1, 4)
    assert run(graphs, "layer", 4) == [("layer", 4)]
    assert run(graphs, "layer", 3) == [("layer", 4)]
    assert run(graphs, "layer", 9) == [("layer", 0)]
    # A region without fixed shapes runs its dynamic graph on the padded step.
    assert run(graphs, "embed", 4) == [("embed", 0)]


def test_a_piece_outside_the_graphs_runs_eagerly_and_does_not_count_as_eager():
    graphs = cache(4, regions=("layer.0", "layer.2"))
    programs = {**graphs.programs, "layer.1.attention": program("layer.1.attention", is_eager=True)}
    graphs = GraphCache(programs=programs, times=TIMES, graphs=graphs.graphs)
    assert run(graphs, "layer.1.attention", 4) == [torch.tensor(42)]
    assert outcomes(graphs) == {("exact", "bucket"): 1}


@pytest.mark.parametrize("reason", ["enforce_eager", "graph_mode"])
def test_without_graphs_everything_is_eager_for_a_reason(reason):
    graphs = GraphCache(programs={"layer": program("layer")}, times=TIMES, never_compiled=reason)
    assert graphs.choose(4) == GraphChoice(outcome="eager", size=4, reason=reason)
    assert run(graphs, "layer", 4) == [torch.tensor(42)]
    assert outcomes(graphs) == {("eager", reason): 2}


def test_a_graph_that_fails_gives_way_to_the_dynamic_one(caplog):
    graphs = cache(1, 4)
    graphs.graphs["layer", 4] = broken
    with caplog.at_level(logging.WARNING):
        assert run(graphs, "layer", 4) == [("layer", 0)]
        # The step was counted as exact before it failed.
        assert outcomes(graphs) == {("dynamic", "graph_failed"): 1}
        assert run(graphs, "layer", 4) == [("layer", 0)]
        assert outcomes(graphs) == {("dynamic", "graph_failed"): 2}
    assert ["out of luck" in message for message in caplog.messages] == [True]
    assert graphs.buckets == (1,)
    assert run(graphs, "layer", 1) == [("layer", 1)]


def test_without_the_dynamic_graph_larger_padding_then_eager():
    graphs = cache(1, 64)
    graphs.graphs["layer", 1] = graphs.graphs["layer", 0] = broken
    assert run(graphs, "layer", 1) == [torch.tensor(42)]
    assert outcomes(graphs) == {("eager", "graph_failed"): 1}
    assert graphs.choose(1) == GraphChoice(outcome="padded", size=64, reason="graph_failed")
    assert graphs.choose(65) == GraphChoice(outcome="eager", size=65, reason="graph_failed")
    # Other regions go on with what they have.
    assert run(graphs, "embed", 65) == [("embed", 0)]


def test_tensors_that_no_program_takes_are_not_the_graphs_fault():
    graphs = cache(4)
    graphs.graphs["layer", 4] = graphs.graphs["layer", 0] = broken
    choice = graphs.choose(4)
    with pytest.raises(TypeError):
        graphs.run("layer", choice, [torch.ones(1), torch.ones(1)])
    assert graphs.buckets == (4,) and not graphs.failed


def test_a_promoted_bucket_comes_and_goes():
    graphs = cache(1, 64)
    graphs.add(5, {"layer": graph("layer", 5)})
    assert run(graphs, "layer", 5) == [("layer", 5)]
    assert outcomes(graphs) == {("exact", "promoted"): 1}
    graphs.remove(5)
    assert graphs.buckets == (1, 64)
    assert run(graphs, "layer", 5) == [("layer", 0)]


def test_a_bucket_needs_a_graph_of_every_region():
    graphs = cache(4, regions=("layer", "layer.window40"))
    graphs.add(5, {"layer": graph("layer", 5)})
    assert graphs.buckets == (4,)


@pytest.mark.numerics
@pytest.mark.parametrize(
    "lengths", [(1,), (2,), (3,), (1, 2), (4,), (2, 1, 1), (1, 1, 1, 1), (5,), (3, 2), (64,), (65,)]
)
def test_compiled_graphs_equal_eager_programs(lengths, family_artifact, kernels):
    """Sizes around the bucket of 4, in tokens, sequences and rows of logits. The kernels are the same and what is
    between them is element-wise, but cos and sin may differ in the last bit. Four rows of so small a model take no
    longer than one."""
    results, caches = [], []
    for is_eager in (True, False):
        runner, manifest, layers = compiled_runner(family_artifact("qwen2"), enforce_eager=is_eager)
        results.append(runner.execute(step_of(lengths, manifest.model.vocab_size, seed=len(lengths))).clone())
        caches.append(layers)
        stats = runner.graph_cache_stats()
        expected = {1: "padded", 2: "padded", 3: "padded", 4: "exact"}.get(sum(lengths), "dynamic")
        assert stats.by_outcome()["eager" if is_eager else expected] == 1
    assert results[1].shape == (len(lengths), manifest.model.vocab_size)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-4)
    for compiled, eager in zip(caches[1], caches[0], strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-4)


def test_a_library_that_cannot_be_loaded_is_left_out(family_artifact, kernels, tmp_path, caplog):
    """The file is there, but it is no library: the loader's own error, whatever made it so."""
    root = family_artifact("qwen3")
    manifest = read_manifest(root)
    damaged = tmp_path / "layer.so"
    damaged.write_bytes(b"\x7fELF not quite")
    entries = [
        replace(entry, file=replace(entry.file, path=str(damaged)))
        if entry.region == "layer" and entry.sizes
        else replace(entry, file=replace(entry.file, path=str(root / entry.file.path)))
        for entry in manifest.graphs
    ]
    programs = [program for program in manifest.programs if program.name != "head"]
    graphs = build_cache(root, "T", TIMES, programs, entries, enforce_eager=False)
    assert "the graph of region layer for bucket 4 is given up" in caplog.text
    assert graphs.buckets == ()
    assert graphs.choose(4) == GraphChoice(outcome="dynamic", size=4, reason="graph_failed")


# What a compiled graph's library exports, of a graph that always fails.
FAILING_GRAPH = """
#include <cstddef>
extern "C" {
int aoti_torch_delete_tensor_object(void*);
int AOTInductorModelContainerCreateWithDevice(void** c, size_t, const char*, const char*) { *c = new int; return 0; }
int AOTInductorModelContainerDelete(void* c) { delete static_cast<int*>(c); return 0; }
int AOTInductorModelContainerGetNumOutputs(void*, size_t* n) { *n = 2; return 0; }
int AOTInductorModelContainerRun(void*, void** inputs, size_t count, void**, size_t, void*, void*) {
  for (size_t i = 0; i < count; ++i) aoti_torch_delete_tensor_object(inputs[i]);
  return 1;
}
void AOTInductorGetLastError(const char** text) { *text = "out of luck"; }
}
"""


def test_a_graph_that_fails_in_the_chain_is_found_and_given_up(family_artifact, kernels, tmp_path, caplog):
    root = family_artifact("qwen3")
    source, library = tmp_path / "failing.cpp", tmp_path / "failing.so"
    source.write_text(FAILING_GRAPH)
    libraries = Path(torch.__file__).parent / "lib"
    command = ["g++", "-shared", "-fPIC", str(source), "-o", str(library), f"-L{libraries}", "-ltorch_cpu"]
    subprocess.run(command, check=True)
    runner, manifest, _ = compiled_runner(root)
    step = step_of((4,), manifest.model.vocab_size, seed=1)
    expected = runner.execute(step).clone()
    runner._token_graphs.add(4, {"layer": CompiledGraph(library)})
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(runner.execute(step), expected, rtol=1e-5, atol=1e-4)
    assert "the graph of region layer for bucket 4 is given up: out of luck" in caplog.text
    assert runner.graph_cache_stats().by_outcome() == {"exact": 1, "padded": 0, "dynamic": 1, "eager": 0}
    # From here on the layers are a chain again, of the dynamic graphs.
    torch.testing.assert_close(runner.execute(step), expected, rtol=1e-5, atol=1e-4)
    assert runner.graph_cache_stats().by_outcome()["dynamic"] == 2
