"""Promotion of hot sizes: what is worth a graph, and that nothing which goes wrong there reaches a step."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.runtime.graphs import cache, compiled_runner, graph, step_of
from xllm_compile.machine import cache_dir
from xllm_compile.runtime.artifact import read_manifest
from xllm_compile.runtime.promotion import (
    COMMAND,
    NO_COMPILER,
    GraphPromoter,
    PromotionConfig,
    coldest,
    entry_path,
    hottest,
    write_entry,
)

LIMIT_S = 300.0


def config(**options):
    return PromotionConfig(store=Path("unused"), **{"min_steps": 10, "min_steps_saved": 1.0, **options})


def tenth(size):
    return 0.1


@pytest.mark.parametrize(
    ("demand", "taken", "expected"),
    [
        ({}, (), None),
        # A single step is worth no compilation, however slow.
        ({7: 9}, (), None),
        ({7: 10}, (), 7),
        ({7: 10, 9: 11}, (), 9),
        ({7: 10, 9: 11}, (9,), 7),
        ({9: 50, 7: 50}, (), 7),
    ],
)
def test_the_size_that_costs_most_without_a_graph(demand, taken, expected):
    assert hottest(demand, tenth, taken, config()) == expected


def test_a_rare_size_that_saves_much_beats_a_frequent_one_that_saves_little():
    assert hottest({7: 1000, 9: 20}, {7: 0.001, 9: 0.09}.__getitem__, (), config()) == 9


def test_too_little_to_save_is_not_worth_it():
    assert hottest({7: 99}, lambda size: 0.01, (), config()) is None
    assert hottest({7: 101}, lambda size: 0.01, (), config()) == 7
    assert hottest({7: 101}, lambda size: 0.01, (), config(), least_value=2.0) is None


def test_the_least_value_a_byte_goes_first():
    sizes = {5: 100, 6: 100, 7: 10}
    assert coldest({5: 3.0, 6: 2.0, 7: 1.0}, sizes, 210) == []
    assert coldest({5: 3.0, 6: 2.0, 7: 1.0}, sizes, 209) == [6]
    assert coldest({5: 3.0, 6: 2.0, 7: 1.0}, sizes, 60) == [6, 5]


def test_what_a_graph_of_its_own_saves():
    graphs = cache(1, 4, 64)
    for size in (2, 3, 5, 40, 63, 65):
        assert 0 < graphs.saving(size) <= 1 - 1 / 1.1 + 1e-9
    assert graphs.saving(3) < graphs.saving(2)
    # Once promoted it keeps its value: that is what the others are weighed against.
    before = graphs.saving(5)
    graphs.add(5, {"layer": graph("layer", 5)})
    assert graphs.saving(5) == before


def promoter_of(tmp_path, *, command=COMMAND, root=Path("nowhere"), **options):
    return GraphPromoter(
        root, "key", PromotionConfig(store=tmp_path, min_steps=1, min_steps_saved=0.01, **options), command
    )


def step_until(promoter, graphs, event, count=1):
    """Step as the runner does until an event was counted."""
    ends, demand = time.monotonic() + LIMIT_S, dict(graphs.demand)
    while promoter.stats().get(event, 0) < count:
        promoter.between_steps(graphs)
        # Idle steps are many, and would age the demand away.
        graphs.demand.update(demand)
        time.sleep(0.0005)
        assert time.monotonic() < ends, promoter.stats()


def script(code):
    return (sys.executable, "-c", f"import sys; print('the reason', file=sys.stderr); sys.exit({code})")


def test_without_a_compiler_serving_goes_on_and_says_so_once(tmp_path, caplog):
    graphs = cache(1, 64)
    promoter = promoter_of(tmp_path, command=script(NO_COMPILER))
    graphs.demand.update({5: 100, 7: 100})
    step_until(promoter, graphs, "no_compiler")
    for _ in range(1000):
        promoter.between_steps(graphs)
    promoter.close()
    assert promoter.stats() == {"no_compiler": 1}
    assert [record.levelname for record in caplog.records if "the reason" in record.message] == ["WARNING"]
    assert graphs.buckets == (1, 64)


def test_a_size_that_cannot_be_compiled_is_not_tried_again(tmp_path, caplog):
    graphs = cache(1, 64)
    promoter = promoter_of(tmp_path, command=script(2))
    graphs.demand.update({5: 100, 7: 50})
    step_until(promoter, graphs, "failed", 2)
    for _ in range(1000):
        promoter.between_steps(graphs)
    promoter.close()
    assert promoter.stats() == {"failed": 2}
    assert "no graph for steps of 5 tokens: the reason" in caplog.text


def test_closing_ends_a_compilation(tmp_path):
    graphs = cache(1, 64)
    promoter = promoter_of(tmp_path, command=(sys.executable, "-c", "import time; time.sleep(600)"))
    graphs.demand[5] = 100
    ends = time.monotonic() + LIMIT_S
    while promoter._child is None and time.monotonic() < ends:
        promoter.between_steps(graphs)
    promoter.close()
    assert promoter._child is not None and promoter._child.returncode == -9


@pytest.fixture
def library(family_artifact, kernels):
    """A graph that loads; it is never run here."""
    root = family_artifact("qwen3")
    (entry,) = (entry for entry in read_manifest(root).graphs if entry.region == "layer" and entry.sizes)
    return root / entry.file.path


def keep(store, library, *sizes):
    for size in sizes:
        name = f"layer-{size}.so"
        (store / name).write_bytes(library.read_bytes())
        write_entry(store, "key", size, {"layer": name})


def test_the_next_start_finds_what_was_promoted(tmp_path, library):
    keep(tmp_path, library, 5, 7)
    graphs = cache(1, 64)
    promoter = promoter_of(tmp_path)
    step_until(promoter, graphs, "loaded", 2)
    promoter.close()
    assert graphs.buckets == (1, 5, 7, 64) and graphs.promoted == {5, 7}
    assert promoter.promoted_bytes == 2 * library.stat().st_size


def test_another_build_does_not(tmp_path, library):
    keep(tmp_path, library, 5)
    graphs = cache(1, 64)
    promoter = GraphPromoter(Path("nowhere"), "another", PromotionConfig(store=tmp_path))
    promoter.close()
    promoter.between_steps(graphs)
    assert graphs.buckets == (1, 64)


def test_a_damaged_graph_is_dropped(tmp_path, library, caplog):
    keep(tmp_path, library, 5)
    with (tmp_path / "layer-5.so").open("r+b") as file:
        file.write(b"damage")
    graphs = cache(1, 64)
    promoter = promoter_of(tmp_path)
    step_until(promoter, graphs, "failed")
    promoter.close()
    assert "is damaged" in caplog.text
    assert graphs.buckets == (1, 64) and not entry_path(tmp_path, "key", 5).exists()


def test_the_budget_keeps_the_sizes_in_use(tmp_path, library):
    keep(tmp_path, library, 5, 7, 9)
    graphs = cache(1, 64)
    graphs.demand.update({5: 50, 7: 1, 9: 50})
    promoter = promoter_of(tmp_path, max_bytes=2 * library.stat().st_size)
    step_until(promoter, graphs, "loaded", 3)
    promoter.close()
    assert promoter.stats()["evicted"] == 1
    assert graphs.promoted == {5, 9} and not entry_path(tmp_path, "key", 7).exists()
    assert promoter.promoted_bytes <= 2 * library.stat().st_size


def run(runner, step):
    """Its logits, and how the graph of its layers was chosen."""
    before = runner.graph_cache_stats().choices
    logits = runner.execute(step).clone()
    after = runner.graph_cache_stats().choices
    (found,) = (labels[1:] for labels, count in after.items() if labels[0] == "layers" and count != before.get(labels))
    return logits, found


@pytest.mark.integration
def test_a_hot_size_is_compiled_and_computes_the_same(family_artifact, kernels):
    """The real command, at this process's priority; the store keeps the graph for the next session."""
    root, store = family_artifact("qwen3"), cache_dir() / "graphs"
    command = [*COMMAND, str(root), "--tokens", "6", "--store", str(store)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    step = step_of((4, 2), read_manifest(root).model.vocab_size, seed=1)
    runner, _, _ = compiled_runner(root)
    expected, found = run(runner, step)
    assert found == ("dynamic", "above_buckets")
    runner.close()
    runner, _, _ = compiled_runner(root, promotion=PromotionConfig(store=store))
    ends = time.monotonic() + LIMIT_S
    # Servers of other tests leave their hot sizes in this store, and those may be loaded first.
    while found != ("exact", "promoted"):
        logits, found = run(runner, step)
        assert time.monotonic() < ends, found
    runner.close()
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.integration
def test_a_machine_without_compiler_is_told_apart(family_artifact, tmp_path):
    command = [*COMMAND, str(family_artifact("qwen3")), "--tokens", "6", "--store", str(tmp_path)]
    env = {**os.environ, "CXX": "no-such-compiler"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == NO_COMPILER
    assert "no C++ compiler" in done.stderr and "\n" not in done.stderr.strip()
