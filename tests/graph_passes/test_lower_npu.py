import operator
from collections.abc import Iterator

import pytest
import torch

from tests.graph_passes.npu_emulation import first_row, halved_npu_inputs, npu_layer_inputs, run_lowered
from tests.graph_passes.regions import (
    MIXED,
    SINGLE,
    SLOT_TOKENS,
    SLOTS,
    embed_graph,
    family_config,
    family_regions,
    head_graph,
    layer_graph,
    layer_inputs,
    region_graph,
    run_graph,
)
from xllm_compile.graph_passes.lower_npu import lower_npu
from xllm_compile.graph_passes.pipeline import RequiredPassError, npu_pipeline, run_passes, split_pipeline
from xllm_compile.graph_passes.verify import GraphVerificationError, verify_graph
from xllm_compile.runtime.ops.collectives import ALL_REDUCE
from xllm_compile.runtime.tensor_parallel import RankConfig, RankGroup

aten = torch.ops.aten
xllm = torch.ops.xllm
FAMILIES = ["qwen2", "qwen3", "llama"]
# Two blocks for each of the four slots of the test's cache, and the padding block.
MAX_MODEL_LEN, BLOCKS_PER_SEQ, NUM_BLOCKS = 200, 2, 2 * SLOTS + 1


def lowered(region):
    reports = run_passes(region, npu_pipeline(max_model_len=MAX_MODEL_LEN, max_num_seqs=SLOTS))
    return region, reports[-1]


def targets(region):
    names = [str(node.target) for node in region.graph.nodes if node.op == "call_function"]
    return [name for name in names if name.startswith(("npu.", "air."))]


def test_a_layer_is_all_ascend_operators():
    region, report = lowered(layer_graph(family_config("qwen3"), torch.bfloat16))
    norm, linear, rotary = "npu.npu_add_rms_norm.default", "npu.npu_linear.default", "npu.npu_rotary_mul.default"
    assert targets(region) == [
        norm,
        linear,
        *["npu.npu_rms_norm.default"] * 2,
        *[rotary] * 2,
        *["npu.npu_scatter_nd_update_.default"] * 2,
        "air.npu_fused_infer_attention_score.default",
        linear,
        norm,
        linear,
        "npu.npu_swiglu.default",
        linear,
    ]
    assert report.matches == 2 + 4 + 2 + 1 + 2 + 3
    assert not any("xllm" in name for name in region.op_counts())
    names = [spec.name for spec in region.inputs]
    assert names[:4] == ["delta", "residual", "cos", "sin"] and names[-2:] == ["k_cache", "v_cache"]
    assert not {"positions", "seq_start", "slot", "kv_cache"} & set(names)
    assert region.inputs[-1].shape == (NUM_BLOCKS * 128, 48)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("step, padding", [(MIXED, 0), (MIXED, 3), (SINGLE, 0)])
def test_layers_equal_the_captured_ones(family, step, padding):
    config = family_config(family)
    for before, after in zip(
        family_regions(config, torch.float32)[1:-1], family_regions(config, torch.float32)[1:-1], strict=True
    ):
        inputs = layer_inputs(config, torch.float32, step, padding)
        lowered(after)
        expected = run_graph(before, inputs)
        found = run_lowered(after, npu_layer_inputs(inputs, NUM_BLOCKS, BLOCKS_PER_SEQ))
        rows = sum(count for count, _ in step)
        for output in ("0", "1"):
            torch.testing.assert_close(found[output][:rows], expected[output][:rows], rtol=1e-4, atol=1e-5)
        for index, name in enumerate(("k_cache", "v_cache")):
            for slot in range(SLOTS):
                start = first_row(slot, BLOCKS_PER_SEQ)
                written = found[name][start : start + SLOT_TOKENS]
                wanted = expected["kv_cache"][slot, :, index].flatten(1)
                torch.testing.assert_close(written, wanted, rtol=1e-4, atol=1e-5)
                assert not found[name][start + SLOT_TOKENS : first_row(slot + 1, BLOCKS_PER_SEQ)].any()


@pytest.fixture
def group() -> Iterator[None]:
    """Of one rank: its sum is its own part."""
    ranks = RankGroup(RankConfig(rank=0, world_size=1))
    ranks.connect()
    yield
    ranks.close()


def halved_and_lowered(region):
    passes = npu_pipeline(max_model_len=MAX_MODEL_LEN, max_num_seqs=SLOTS)
    run_passes(region, [step for step in passes if not step.after_split])
    halves = region.copy(region.name + ".split")
    reports = run_passes(halves, [*split_pipeline(), *(step for step in passes if step.after_split)])
    return halves, reports[-1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("step, padding", [(MIXED, 0), (MIXED, 3), (((6, 3),), 1), (((1, 4),), 4)])
def test_a_layer_on_halves_equals_the_captured_one(family, step, padding, group):
    config = family_config(family, num_key_value_heads=2)
    before, after = (family_regions(config, torch.float32, 2)[1] for _ in range(2))
    halves, report = halved_and_lowered(after)
    # Twice what a layer has, and the streams of four sums.
    names = targets(halves)
    norms = 4 if family == "qwen3" else 0
    assert report.matches == 2 * (2 + 4 + 1 + 2 + 2) + 1 + norms + 4
    assert names.count("air.npu_fused_infer_attention_score.default") == 2
    assert names.count("air.scope_enter.default") == names.count("air.scope_exit.default") == 4
    assert not any("xllm" in name for name in halves.op_counts())
    inputs = layer_inputs(config, torch.float32, step, padding)
    inputs["kv_cache"] = inputs["kv_cache"][:, :, :, : config.num_kv_heads // 2].contiguous()
    expected = run_graph(before, inputs)
    found = run_lowered(halves, halved_npu_inputs(npu_layer_inputs(inputs, NUM_BLOCKS, BLOCKS_PER_SEQ)))
    rows = sum(count for count, _ in step)
    for index in (0, 1):
        parts = [torch.ops._c10d_functional.wait_tensor(found[str(2 * index + half)]) for half in (0, 1)]
        torch.testing.assert_close(torch.cat(parts)[:rows], expected[str(index)][:rows], rtol=1e-4, atol=1e-5)
    for index, name in enumerate(("k_cache", "v_cache")):
        for slot in range(SLOTS):
            start = first_row(slot, BLOCKS_PER_SEQ)
            written = found[name][start : start + SLOT_TOKENS]
            wanted = expected["kv_cache"][slot, :, index].flatten(1)
            torch.testing.assert_close(written, wanted, rtol=1e-4, atol=1e-5)


def test_only_the_sums_of_halves_are_on_the_second_stream():
    halves, _ = halved_and_lowered(family_regions(family_config("qwen3"), torch.bfloat16, 2)[1])
    inside, labelled = False, []
    for node in halves.graph.nodes:
        if "scope_enter" in str(node.target):
            inside = dict(zip(*node.args, strict=True))["_user_stream_label"] == "1"
        elif "scope_exit" in str(node.target):
            inside = False
        elif inside and node.target is not operator.getitem:
            labelled.append(node.target)
    assert labelled == [ALL_REDUCE] * 4


def test_the_window_counts():
    """The comparison above can fail: without the band the windowed layer gives something else."""
    config = family_config("qwen2", sliding_window=3)
    before, after = (family_regions(config, torch.float32)[2] for _ in range(2))
    inputs = layer_inputs(config, torch.float32, MIXED)
    lowered(after)
    given = npu_layer_inputs(inputs, NUM_BLOCKS, BLOCKS_PER_SEQ)
    expected = run_graph(before, inputs)["0"]
    torch.testing.assert_close(run_lowered(after, given)["0"], expected, rtol=1e-4, atol=1e-5)
    (attention,) = (node for node in after.graph.nodes if "fused_infer" in str(node.target))
    attention.kwargs = {**attention.kwargs, "pre_tokens": 3}
    after.finish()
    assert not torch.allclose(run_lowered(after, given)["0"], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_embed_and_head_equal_the_captured_ones(family):
    config = family_config(family)
    ints = {name: torch.tensor([3, 0, 7], dtype=torch.int32) for name in ("token_ids", "positions", "rope_len")}
    expected = run_graph(embed_graph(config), ints)
    found = run_lowered(lowered(embed_graph(config))[0], ints)
    for name in ("0", "1"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)
    for name in ("2", "3"):
        full = torch.cat([expected[name]] * 2, -1)
        torch.testing.assert_close(found[name].view(3, -1), full, rtol=0, atol=0)
        assert found[name].shape == (1, 3, 1, config.head_dim)
    hidden = torch.randn(2, 5, config.hidden_size, generator=torch.Generator().manual_seed(1))
    rows = {"delta": hidden[0], "residual": hidden[1], "logits_at": torch.tensor([4, 1], dtype=torch.int32)}
    expected = run_graph(head_graph(config), rows)
    found = run_lowered(lowered(head_graph(config))[0], rows)
    torch.testing.assert_close(found["0"], expected["0"], rtol=1e-4, atol=1e-5)


def test_a_second_run_finds_nothing():
    for region in family_regions(family_config("qwen3"), torch.bfloat16):
        lowered(region)
        before = region.module.code
        assert lower_npu(region, num_blocks=NUM_BLOCKS, blocks_per_seq=BLOCKS_PER_SEQ).matches == 0
        assert region.module.code == before


def test_streams_and_core_shares_become_scopes():
    region = layer_graph(family_config("qwen3"), torch.bfloat16)
    run_passes(region, npu_pipeline(max_model_len=MAX_MODEL_LEN)[:-1])
    norm = next(reversed(region.graph.find_nodes(op="call_function", target=xllm.add_rms_norm.default)))
    silu = next(iter(region.graph.find_nodes(op="call_function", target=xllm.silu_mul.default)))
    products = list(region.graph.find_nodes(op="call_function", target=aten.linear.default))
    norm.meta["core_share"] = {"cube": 8, "vector": 16}
    for node in (products[2], silu):
        node.meta |= {"stream": "1", "core_share": {"cube": 8, "vector": 16}}
    report = lower_npu(region, num_blocks=NUM_BLOCKS, blocks_per_seq=BLOCKS_PER_SEQ)
    verify_graph(region, after="lower_npu")
    assert report.matches == 14 + 2
    tail = [node for node in region.graph.nodes if node.op == "call_function" and node.target is not operator.getitem]
    assert [str(node.target).split(".")[1] for node in tail[-8:]] == [
        "scope_enter",
        "npu_add_rms_norm",
        "scope_exit",
        "scope_enter",
        "npu_linear",
        "npu_swiglu",
        "scope_exit",
        "npu_linear",
    ]
    cores = {"_op_aicore_num": "8", "_op_vectorcore_num": "16"}
    stream = {"_user_stream_label": "1", "_user_stream_priority": "0", "_enable_inner_parallel": "True"}
    scopes = [dict(zip(*node.args, strict=True)) for node in tail if "scope_enter" in str(node.target)]
    assert scopes == [cores, stream | cores]
    # Taken as planned: once.
    assert lower_npu(region, num_blocks=NUM_BLOCKS, blocks_per_seq=BLOCKS_PER_SEQ).matches == 0


def all_reduce_region(*, stream=None, bias=False, dtype=torch.bfloat16):
    def function(inputs, weights):
        product = torch.nn.functional.linear(inputs["x"], weights["w"], weights.get("b"))
        return (torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(product, "sum", "tp")),)

    weights = {"w": (6, 4), **({"b": (6,)} if bias else {})}
    region = region_graph(function, {"x": ("T", 4)}, weights, name="part", dtype=dtype)
    for node in region.graph.find_nodes(op="call_function", target=torch.ops._c10d_functional.all_reduce.default):
        if stream is not None:
            node.meta["stream"] = stream
    return region


def test_product_and_all_reduce_become_one():
    region = all_reduce_region()
    assert lower_npu(region, num_blocks=1, blocks_per_seq=1).matches == 1
    verify_graph(region, after="lower_npu")
    (fused,) = region.graph.find_nodes(op="call_function", target=torch.ops.npu.npu_mm_all_reduce_base.default)
    assert fused.args[2] == "tp" and targets(region) == ["npu.npu_mm_all_reduce_base.default"]


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"stream": "comm"}, "all-reduce overlaps computation"),
        ({"bias": True}, "with a bias, or no sum"),
        ({"dtype": torch.float32}, "of a float32 product"),
    ],
)
def test_other_all_reduces_stay(options, reason):
    region = all_reduce_region(**options)
    report = lower_npu(region, num_blocks=1, blocks_per_seq=1)
    assert reason in next(iter(report.skips))
    assert any("all_reduce" in name and "c10d" in name for name in region.op_counts())


def test_partly_rotated_heads_stay():
    config = family_config("qwen3")
    region = layer_graph(config)
    for name in ("cos", "sin"):
        region.placeholder(name).meta["val"] = region.placeholder(name).meta["val"][:, :4]
    report = lower_npu(region, num_blocks=NUM_BLOCKS, blocks_per_seq=BLOCKS_PER_SEQ)
    assert report.skips == {"heads are rotated in part": 1}
    assert "xllm.attention.default" in region.op_counts()


def test_a_write_through_a_view_is_refused():
    region, _ = lowered(layer_graph(family_config("qwen3"), torch.bfloat16))
    write = next(iter(region.graph.find_nodes(op="call_function", target=torch.ops.npu.npu_scatter_nd_update_.default)))
    cache = write.args[0]
    with region.graph.inserting_before(write):
        view = region.graph.call_function(aten.view.default, (cache, [-1, 48]))
    view.meta["val"] = cache.meta["val"]
    write.replace_input_with(cache, view)
    with pytest.raises(GraphVerificationError, match="which is no input of the region"):
        verify_graph(region, after="a view")


def test_a_read_before_the_write_is_refused():
    region, _ = lowered(layer_graph(family_config("qwen3"), torch.bfloat16))
    writes = list(region.graph.find_nodes(op="call_function", target=torch.ops.npu.npu_scatter_nd_update_.default))
    (attention,) = (node for node in region.graph.nodes if "fused_infer" in str(node.target))
    attention.append(writes[1])
    with pytest.raises(GraphVerificationError, match="reads the cache before it is written"):
        verify_graph(region, after="a move")


def test_options():
    names = [step.name for step in npu_pipeline(max_model_len=1)]
    assert names[-1] == "lower_npu" and "pack_linear" not in names
    with pytest.raises(ValueError, match="'lower_npu' cannot be left out"):
        npu_pipeline(max_model_len=1, disabled=frozenset({"lower_npu"}))
    region = region_graph(lambda inputs, _: (inputs["x"] + 1,), {"x": ("T", 4)}, name="layer")
    with pytest.raises(RequiredPassError):
        run_passes(region, npu_pipeline(max_model_len=1))
