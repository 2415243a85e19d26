"""NPU compile and call-trace check (null device): see README.md for what it does not prove."""

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch

from tests.graph_passes.regions import family_config, family_regions, layer_graph
from tests.graph_passes.test_cube_vector_balance import balance, branching
from tests.helpers import DEMO_MODEL, REPOSITORY
from tests.npu import jobs
from xllm_compile.capture import capture_region, emit_program
from xllm_compile.graph_passes.device_spec import device_spec
from xllm_compile.graph_passes.lower_npu import lower_npu
from xllm_compile.graph_passes.pipeline import npu_pipeline, run_passes, split_pipeline
from xllm_compile.models.decoder import build_regions
from xllm_compile.runtime.artifact import is_intact, read_manifest
from xllm_compile.runtime.ops.npu import SCHEMAS
from xllm_compile.targets import UnsupportedOperatorError
from xllm_compile.targets.npu.compile_region import planned_ops
from xllm_compile.targets.npu.ge_graph import GeGraphError, check_graph
from xllm_compile.workers import worker_pool

SIZES = {"T": 8, "S": 8, "R": 8}
CACHES = ["k_cache", "v_cache"]
xllm = torch.ops.xllm


@pytest.fixture(scope="session")
def trace(tmp_path_factory):
    return tmp_path_factory.mktemp("trace") / "calls.txt"


@pytest.fixture(scope="session")
def run(trace, tmp_path_factory):
    """Calls a function in a process with torch_npu on the null device; every call to CANN goes to ``trace``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLLM_NULL_NPU_TRACE", str(trace))
        with worker_pool("npu", 1, tmp_path_factory.mktemp("scratch")) as pool:
            yield lambda function, *args: pool.submit(function, *args).result(timeout=300)


@pytest.fixture
def compiled(run, tmp_path):
    """Compiles a lowered region; returns the operators of the GE graph as written."""
    return lambda region, **sizes: run(
        jobs.compile_ops, emit_program(region, ()).to_json(), SIZES | sizes, str(tmp_path / f"{region.name}.air")
    )


def lowered(region):
    run_passes(region, npu_pipeline(max_model_len=256))
    return region


def scheduled_layer(labels=True):
    """A layer with gate-up and SiLU on a stream of their own, as a scheduling pass would mark them."""
    region = layer_graph(family_config("qwen3"), torch.bfloat16)
    passes = npu_pipeline(max_model_len=256)
    run_passes(region, passes[:-1])
    (silu,) = region.graph.find_nodes(op="call_function", target=xllm.silu_mul.default)
    for node in (silu, silu.args[0]):
        if labels:
            node.meta |= {"stream": "mlp", "core_share": {"cube": 8, "vector": 16}}
    run_passes(region, passes[-1:])
    return region


def test_schemas_are_those_of_torch_npu(run):
    found = run(jobs.operator_schemas)
    assert found.keys() == SCHEMAS.keys()
    for name, schema in SCHEMAS.items():
        assert str(torch._C.parse_schema(name + schema)) == found[name]


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_every_region_compiles_to_fused_operators(compiled, family):
    for region in family_regions(family_config(family), torch.bfloat16):
        lowered(region)
        ops = compiled(region)
        types = Counter(op.type for op in ops)
        assert not {"TensorMove", "Assign", "Transpose", "TransData"} & types.keys()
        assert {op.name for op in ops if op.type in ("Data", "RefData")} <= {*region.weights} | {
            spec.name for spec in region.inputs
        }
        if region.name.startswith("layer"):
            expected = {"AddRmsNorm": 2, "MatMul": 4, "SwiGlu": 1, "RotaryMul": 2, "ScatterNdUpdate": 2}
            expected |= {"FusedInferAttentionScore": 1, "RefData": 2, "RmsNorm": 2 if family == "qwen3" else 0}
            assert {name: types[name] for name in expected} == expected
        elif region.name == "head":
            assert (types["AddRmsNorm"], types["MatMul"], types["GatherV2"]) == (1, 1, 2)


def test_streams_and_core_limits_arrive(compiled):
    region = scheduled_layer()
    ops = compiled(region)
    placed = [(op.type, op.stream, op.cube_cores, op.vector_cores) for op in ops if op.stream or op.cube_cores]
    assert placed == [("MatMul", "mlp", "8", "16"), ("SwiGlu", "mlp", "8", "16")]


def test_what_the_balance_pass_plans_arrives(compiled):
    region = branching()
    assert balance(region).matches == 1
    assert lower_npu(region, num_blocks=1, blocks_per_seq=1).matches > 3
    products = [(op.stream, op.cube_cores) for op in compiled(region) if op.type == "MatMul"]
    assert products == [(None, "6"), ("layer.0.1", "2"), (None, None)]


def test_lengths_are_inputs_not_constants(compiled):
    ops = compiled(lowered(layer_graph(family_config("qwen3"), torch.bfloat16)))
    (attention,) = (op for op in ops if op.type == "FusedInferAttentionScore")
    assert {"query_end:0", "kv_len:0", "block_table:0", "causal_mask:0"} <= set(attention.inputs)


def test_a_layer_of_one_rank_of_two(compiled):
    region = lowered(capture_region(build_regions(family_config("qwen3"), 2)[1], torch.bfloat16))
    types = Counter(op.type for op in compiled(region))
    # The output and the down projection, each with its sum over the ranks; weights are not transposed first.
    assert types["MatmulAllReduceAddRmsNorm"] == types["MatmulAllReduce"] == types["AddRmsNorm"] == 1
    assert types["MatMul"] == 2
    assert types["HcomAllReduce"] == types["Transpose"] == 0


def halves_of_a_rank():
    """A layer of one rank of two, on two halves of a step."""
    region = capture_region(build_regions(family_config("qwen3"), 2)[1], torch.bfloat16)
    passes = npu_pipeline(max_model_len=256)
    run_passes(region, [step for step in passes if not step.after_split])
    halves = region.copy("layer.split")
    run_passes(halves, [*split_pipeline(), *(step for step in passes if step.after_split)])
    return halves


def test_the_sums_of_halves_are_on_a_stream_of_their_own(compiled):
    ops = compiled(halves_of_a_rank(), TA=4, TB=4)
    assert [(op.type, op.stream) for op in ops if op.stream] == [("HcomAllReduce", "1")] * 4


def test_the_command_compiles_steps_in_halves(run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # A link so slow that halves pay for a model this small.
    spec = replace(device_spec("ascend-910b2"), link_bytes_per_s=1e9, link_latency_s=0.0, launch_s=0.0)
    (tmp_path / "spec.json").write_text(json.dumps(spec.to_json()))
    output = tmp_path / "tp3.xllm"
    command = [sys.executable, "-m", "xllm_compile.cli", str(DEMO_MODEL), "-o", str(output), "--target", "npu"]
    command += ["--dtype", "bfloat16", "--buckets", "64", "--max-num-batched-tokens", "64"]
    command += ["--tensor-parallel-size", "3", "--device-spec", str(tmp_path / "spec.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(output)
    assert manifest.split_buckets == (64,)
    files = {entry.file.path for entry in manifest.graphs}
    assert {"graphs/embed.split-T64.air", "graphs/layer.split-T64.air", "graphs/head.split-R64.air"} < files
    ops = run(jobs.read_ops, str(output / "graphs" / "layer.split-T64.air"))
    assert [(op.type, op.stream) for op in ops if op.stream] == [("HcomAllReduce", "1")] * 4
    # A step in one piece sums inside its products.
    whole = run(jobs.read_ops, str(output / "graphs" / "layer-T64.air"))
    types = Counter(op.type for op in whole)
    assert types["MatmulAllReduceAddRmsNorm"] == types["MatmulAllReduce"] == 1


def test_planted_a_missing_label_is_red(compiled):
    plan = planned_ops(scheduled_layer().graph)
    check_graph("layer", compiled(scheduled_layer()), plan, CACHES)
    with pytest.raises(GeGraphError, match="on stream 'mlp' with 8 cube and 16 vector cores, the GE graph has 0"):
        check_graph("layer", compiled(scheduled_layer(labels=False)), plan, CACHES)


def test_planted_a_write_through_a_view_is_red(run, tmp_path):
    program = emit_program(lowered(layer_graph(family_config("qwen3"), torch.bfloat16)), ())
    call = "npu_scatter_nd_update_.default(k_cache"
    assert program.code.count(call) == 1
    code = program.code.replace(call, "npu_scatter_nd_update_.default(torch.ops.aten.view.default(k_cache, [-1, 48])")
    # The cache as the attention wants it, the write through a view of that.
    rows = next(spec.shape[0] for spec in program.inputs if spec.name == "k_cache")
    shape = (int(rows) // 128, 128, 48)
    inputs = [replace(spec, shape=shape) if spec.name == "k_cache" else spec for spec in program.inputs]
    faulty = replace(program, code=code, inputs=tuple(inputs))
    with pytest.raises(GeGraphError, match=r"through|copies the whole of k_cache"):
        run(jobs.compile_ops, faulty.to_json(), SIZES, str(tmp_path / "faulty.air"))
    assert not (tmp_path / "faulty.air").exists()


def test_planted_a_whole_copy_is_red(run, tmp_path):
    program = emit_program(lowered(layer_graph(family_config("qwen3"), torch.bfloat16)), ())
    call = "torch.ops.aten.view.default(v_cache, [-1, 128, 48])"
    assert program.code.count(call) == 1
    faulty = replace(program, code=program.code.replace(call, call.replace("(v_cache", "(v_cache * 2")))
    with pytest.raises(GeGraphError, match="copies the whole of v_cache"):
        run(jobs.compile_ops, faulty.to_json(), SIZES, str(tmp_path / "faulty.air"))


def test_an_operator_without_lowering_is_named(run, tmp_path):
    region = layer_graph(family_config("qwen3"), torch.bfloat16)
    with pytest.raises(UnsupportedOperatorError) as caught:
        run(
            jobs.compile_ops,
            emit_program(region, ()).to_json(),
            SIZES | {"S1": 9, "L": 4, "M": 128},
            str(tmp_path / "plain.air"),
        )
    assert "xllm::attention" in caught.value.operators


def test_real_sizes_take_address_space_only(run, tmp_path):
    """A layer of Qwen3-0.6B's shape over 64 sequences of 40960 tokens: 21 GB of cache that is never touched."""
    config = family_config(
        "qwen3",
        hidden_size=1024,
        intermediate_size=3072,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
    )
    region = layer_graph(config, torch.bfloat16)
    run_passes(region, npu_pipeline(max_model_len=40960))
    ops = run(jobs.compile_ops, emit_program(region, ()).to_json(), {"T": 512, "S": 65}, str(tmp_path / "big.air"))
    check_graph("layer", ops, planned_ops(region.graph), CACHES)


def test_compiling_runs_nothing(compiled, trace):
    """The call trace: CANN is initialised and asked for addresses; no kernel is launched, nothing is copied or run."""
    compiled(lowered(layer_graph(family_config("qwen3"), torch.bfloat16)))
    calls = {line.split()[0] for line in trace.read_text().splitlines()}
    assert {"aclInit", "aclrtMalloc"} <= calls
    launched = re.compile(r"aclnn|aclop|aclrtMemcpy|aclrtLaunch|aclmdl.*Execute|Hccl|.*RunGraph")
    assert [call for call in sorted(calls) if launched.match(call)] == []


def test_the_command_writes_an_artifact_and_the_same_bytes_again(run, tmp_path, monkeypatch):
    digests = []
    for name in ("one", "two"):
        # A cache of its own: the second compiles again.
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache {name}"))
        output = tmp_path / f"{name}.xllm"
        command = [sys.executable, "-m", "xllm_compile.cli", str(DEMO_MODEL), "-o", str(output), "--target", "npu"]
        command += ["--dtype", "bfloat16", "--buckets", "4,64", "--max-num-batched-tokens", "64"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
        assert done.returncode == 0, done.stderr
        manifest = read_manifest(output)
        assert manifest.target == "npu" and manifest.kernels is None
        assert all(is_intact(output, entry.file) for entry in manifest.graphs)
        digests.append({entry.file.path: entry.file.digest for entry in manifest.graphs})
    assert digests[0] == digests[1]
    assert sorted(digests[0]) == [
        f"graphs/{name}.air" for name in ("embed-T4", "embed-T64", "head-R4", "head-R64", "layer-T4", "layer-T64")
    ]
    ops = run(jobs.read_ops, str(tmp_path / "one.xllm" / "graphs" / "layer-T4.air"))
    assert Counter(op.type for op in ops)["FusedInferAttentionScore"] == 1
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert "is up to date" in done.stderr
    text = json.dumps(read_manifest(output).to_json())
    assert str(tmp_path) not in text
