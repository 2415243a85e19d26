"""Building twice, changing a little, losing the cache, moving away, being killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY, kernel_library
from xllm_compile.atomic_dir import atomic_directory
from xllm_compile.bucket_plan import read_workload
from xllm_compile.build import build
from xllm_compile.build_config import BuildConfig
from xllm_compile.build_error import BuildError
from xllm_compile.build_key import build_key
from xllm_compile.device import choose_device
from xllm_compile.graph_passes.quantisation import Quantisation
from xllm_compile.graph_store import GraphStore, link_or_copy
from xllm_compile.machine import cache_dir
from xllm_compile.models.decoder import build_regions
from xllm_compile.progress import NoProgress
from xllm_compile.runtime.artifact import MANIFEST, ArtifactMismatchError, check_artifact, read_manifest
from xllm_compile.runtime.instance import open_instance
from xllm_compile.runtime.isa import isa_features
from xllm_compile.source_reader import read_source


def config(model_dir, output, **options):
    """The dynamic-shape graphs only: embed, layer and head."""
    return BuildConfig(**{"model_dir": model_dir, "output": output, "dtype": "float32", "buckets": ()} | options)


def run(*args, **options):
    return build(config(*args, **options), NoProgress())


@pytest.fixture(scope="module")
def model(tiny_model_dir, tmp_path_factory):
    """Under a name of its own, which the artifact takes."""
    return shutil.copytree(tiny_model_dir("qwen3"), tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def built(model, tmp_path_factory):
    output = tmp_path_factory.mktemp("built") / "tiny.xllm"
    assert run(model, output).num_graphs == 4
    return output


@pytest.fixture
def previous(built, tmp_path):
    """A copy of the artifact to build over."""
    return shutil.copytree(built, tmp_path / "tiny.xllm")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty graph cache but for the kernels."""
    kernels = kernel_library()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = GraphStore(cache_dir() / "graphs")
    store.root.mkdir(parents=True)
    link_or_copy(kernels, store.root / kernels.name)
    return store


def listing(root):
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(root.rglob("*"))}


def graph_keys(root):
    return {graph.region: graph.key for graph in read_manifest(root).graphs}


def test_an_artifact_is_complete(built):
    check_artifact(built, read_manifest(built), isa_features(), verify_weights=True)
    files = sorted(str(path.relative_to(built)) for path in built.rglob("*") if path.is_file())
    assert files == [
        "graphs/embed-dynamic.so",
        "graphs/head-dynamic.so",
        "graphs/kernels.so",
        "graphs/layer-dynamic.so",
        "graphs/pool-dynamic.so",
        "manifest.json",
        "report/index.html",
        "report/timeline.json",
        "tokenizer/config.json",
        "tokenizer/generation_config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "weights/model.safetensors",
    ]
    assert list(built.parent.iterdir()) == [built]


def test_a_second_build_changes_nothing(model, built):
    before = listing(built)
    result = run(model, built)
    assert result.is_up_to_date and result.num_compiled == 0
    assert listing(built) == before


def test_two_builds_of_the_same_are_the_same(model, built, tmp_path):
    result = run(model, tmp_path / "again.xllm")
    assert not result.is_up_to_date and result.num_compiled == 0
    assert read_manifest(tmp_path / "again.xllm").stable_json() == read_manifest(built).stable_json()


@pytest.mark.parametrize("part", [MANIFEST, "graphs/layer-dynamic.so", "graphs/kernels.so"])
def test_a_damaged_artifact_is_built_again(model, built, previous, part):
    (previous / part).write_bytes(b"damage")
    result = run(model, previous)
    assert not result.is_up_to_date and result.num_compiled == 0
    assert read_manifest(previous).stable_json() == read_manifest(built).stable_json()
    check_artifact(previous, read_manifest(previous), isa_features(), verify_weights=True)


def test_leaving_a_pass_out_compiles_the_layer_only(model, built, previous, own_cache):
    result = run(model, previous, disabled_passes=frozenset({"silu_mul"}))
    assert (result.num_graphs, result.num_compiled) == (4, 1)
    before, after = graph_keys(built), graph_keys(previous)
    assert {region for region in before if before[region] != after[region]} == {"layer"}
    # Nothing of the weights changed: the file is the old artifact's.
    assert read_manifest(previous).weights == read_manifest(built).weights


def test_without_the_graph_cache_the_old_artifact_has_the_graphs(model, built, previous, own_cache):
    weights = (previous / "weights/model.safetensors").stat().st_ino
    result = run(model, previous, max_num_batched_tokens=77)
    assert not result.is_up_to_date and result.num_compiled == 0
    assert graph_keys(previous) == graph_keys(built)
    assert read_manifest(previous).max_num_batched_tokens == 77
    assert (previous / "weights/model.safetensors").stat().st_ino == weights


def test_other_weights_keep_the_graphs(model, built, previous, tiny_model_dir, tmp_path):
    other = shutil.copytree(tiny_model_dir("qwen3", dtype="bfloat16"), tmp_path / "tiny")
    result = run(other, previous)
    assert result.num_compiled == 0 and not result.is_up_to_date
    assert graph_keys(previous) == graph_keys(built)
    assert read_manifest(previous).weights_key != read_manifest(built).weights_key


KEYS_SCRIPT = """
import json, sys
from pathlib import Path
import xllm_compile
from xllm_compile.build import plan_buckets
from xllm_compile.region_programs import make_programs
from xllm_compile.source_reader import read_source
from xllm_compile.build_config import BuildConfig
from xllm_compile.build_key import build_key, compiler_version
from xllm_compile.device import choose_device
from xllm_compile.graph_jobs import list_jobs
from xllm_compile.progress import NoProgress
from xllm_compile.targets import lowering_for
config = BuildConfig(model_dir=Path(sys.argv[1]), output=Path(sys.argv[2]), dtype="float32", buckets=())
source, compiler, device = read_source(config), compiler_version(), choose_device("cpu", None)
programs, reports = make_programs(source, config, NoProgress())
_, buckets = plan_buckets(config, (), device, reports)
jobs = list_jobs(programs, buckets.tokens, buckets.logits, lowering_for("cpu"))
print(json.dumps({
    "from": xllm_compile.__file__,
    "build": build_key(config, source, (), device, compiler),
    "graphs": {job.program.name: job.key for job in jobs},
}))
"""


def test_keys_know_no_place(model, built, tmp_path):
    """Checkout, model, HOME and working folder are elsewhere; every key is the same."""
    checkout = tmp_path / "other checkout"
    checkout.mkdir()
    parts = ["xllm_compile", "graph_passes", "models", "runtime", "scheduler", "benchmarks"]
    for part in parts:
        ignore = shutil.ignore_patterns("__pycache__", "*.safetensors")
        shutil.copytree(REPOSITORY / part, checkout / part, symlinks=True, ignore=ignore)
    moved = shutil.copytree(model, tmp_path / "elsewhere" / "tiny")
    environment = os.environ | {"PYTHONPATH": str(checkout), "HOME": str(tmp_path), "HOSTNAME": "other", "TZ": "UTC-9"}
    done = subprocess.run(
        [sys.executable, "-c", KEYS_SCRIPT, moved, tmp_path / "out.xllm"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["from"].startswith(str(checkout))
    assert found["build"] == read_manifest(built).build_key
    assert found["graphs"] == graph_keys(built)


def test_the_key_covers_every_option_that_changes_the_artifact(model, tmp_path):
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"input_length": 37, "output_length": 5}\n')

    def key(compiler="g++ 1", **options):
        chosen = config(model, tmp_path / "x.xllm", **options)
        device = choose_device("cpu", chosen.device_spec)
        return build_key(chosen, read_source(chosen), read_workload(chosen), device, compiler)

    keys = [
        key(),
        key(dtype="bfloat16"),
        key(max_model_len=100),
        key(max_num_batched_tokens=100),
        key(buckets=(4,)),
        key(disabled_passes=frozenset({"silu_mul"})),
        key(quantisation=Quantisation(scheme="int8")),
        key(quantisation=Quantisation(scheme="int8-dynamic")),
        key(quantisation=Quantisation(scheme="int4")),
        key(quantisation=Quantisation(scheme="int4-dynamic")),
        key(quantisation=Quantisation(scheme="int4", group_size=128)),
        key(quantisation=Quantisation(scheme="int4", has_head=True)),
        key(compiler="g++ 2"),
        key(buckets=None),
        key(buckets=None, workload=trace),
        key(device_spec=Path("h200")),
    ]
    assert len(set(keys)) == len(keys)
    # How it is built is not what is built.
    assert key(jobs=1) == key()


def children_of(pid):
    """Every living descendant."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(stat.parent.name)] = int(fields[1])
    found: set[int] = set()
    queue = [pid]
    while queue:
        parent = queue.pop()
        fresh = {child for child, of in parents.items() if of == parent} - found
        found |= fresh
        queue += fresh
    return found


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.05)


@pytest.mark.integration
@pytest.mark.parametrize("has_previous", [False, True])
def test_a_killed_build(model, built, tmp_path, own_cache, has_previous):
    """SIGKILL while graphs compile: nothing new loads, the old artifact still does, no worker goes on."""
    output = tmp_path / "tiny.xllm"
    if has_previous:
        shutil.copytree(built, output)
    options = ["--dtype", "float32", "--buckets", "4", "--disable-pass", "silu_mul"]
    command = [sys.executable, "-m", "xllm_compile.cli", str(model), "-o", str(output), *options]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    building = tmp_path / ".tiny.xllm.building"
    try:
        # The scratch folder of one graph: a worker is compiling.
        until(lambda: any(own_cache.root.glob(".inductor-*")) or process.poll() is not None)
        assert process.poll() is None
        workers = children_of(process.pid)
        assert workers
    finally:
        process.kill()
        process.wait()
    until(lambda: not any(map(is_alive, workers)))
    with pytest.raises(ArtifactMismatchError):
        open_instance(building)
    if has_previous:
        check_artifact(output, read_manifest(output), isa_features(), verify_weights=True)
        assert read_manifest(output) == read_manifest(built)
    else:
        assert not output.exists()
    # The next build clears up. Its graphs come from the artifact of the first, not from the cache of the killed one.
    for graph in read_manifest(built).graphs:
        link_or_copy(built / graph.file.path, own_cache.path(graph.key))
    run(model, output, max_num_batched_tokens=77)
    assert graph_keys(output) == graph_keys(built)
    assert [path.name for path in tmp_path.glob("*tiny.xllm*")] == ["tiny.xllm"]


def test_a_build_that_finds_another_writing_is_refused(model, built, tmp_path):
    output = tmp_path / "tiny.xllm"
    with atomic_directory(output), pytest.raises(ValueError, match="another build is writing"):
        run(model, output)
    assert not run(model, output).is_up_to_date


@pytest.mark.integration
def test_an_interrupted_build(model, tmp_path, own_cache):
    """Ctrl-C is no error of the user's: exit code 130, no traceback, and no wait for what is being compiled."""
    output = tmp_path / "tiny.xllm"
    command = [sys.executable, "-m", "xllm_compile.cli", str(model), "-o", str(output), "--dtype", "float32"]
    # A suite that runs in the background of a shell was told to ignore the signal, and so are its children.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    until(lambda: any(own_cache.root.glob(".inductor-*")) or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    workers = children_of(process.pid)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "xllm-compile: interrupted; nothing was written" in stderr.splitlines()
    assert "Traceback" not in stderr
    until(lambda: not any(map(is_alive, workers)))
    assert not output.exists() and not (tmp_path / ".tiny.xllm.building").exists()


def test_an_operator_that_cannot_be_lowered_is_named_with_the_model_line(model, tmp_path, monkeypatch):
    def with_nanmedian(decoder, *given):
        embed, *others = build_regions(decoder, *given)

        def function(inputs, weights):
            hidden, *rest = embed.function(inputs, weights)
            return hidden + hidden.nanmedian(0).values, *rest

        return [replace(embed, function=function), *others]

    for user in ("region_programs", "build_output"):
        monkeypatch.setattr(f"xllm_compile.{user}.build_regions", with_nanmedian)
    with pytest.raises(BuildError, match="region embed uses aten::nanmedian") as error:
        run(model, tmp_path / "m.xllm")
    assert "test_build.py" in str(error.value)
    assert "return hidden + hidden.nanmedian(0).values, *rest" in str(error.value)
    assert not (tmp_path / "m.xllm").exists()
