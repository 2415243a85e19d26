"""Costs of a captured layer against figures worked out by hand."""

import pytest
import torch
import torch.nn.functional as F

from tests.graph_passes.regions import embed_graph, family_config, family_regions, head_graph, layer_graph, region_graph
from xllm_compile.graph_passes.cost_model import CostModel, NodeCost
from xllm_compile.graph_passes.device_spec import device_spec
from xllm_compile.graph_passes.node_cost import (
    _RULES,
    UnknownCostError,
    _name,
    region_costs,
    region_seconds,
    step_seconds,
)
from xllm_compile.graph_passes.pipeline import cpu_pipeline, npu_pipeline, run_passes
from xllm_compile.graph_passes.quantisation import Quantisation
from xllm_compile.graph_passes.step_shape import StepShape
from xllm_compile.runtime.ops import LIBRARY, SCHEMAS, npu

CONFIG = family_config("qwen3")
H, K, D, E, FF = CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.head_dim, CONFIG.hidden_size, CONFIG.intermediate_size
# A chunk of 5 after 10, a prompt of 3, a decode at 41.
STEP = StepShape(sequences=((5, 15), (3, 3), (1, 41)), num_logits=2)


def costs(region, step=STEP):
    found: dict[str, list[NodeCost]] = {}
    for node, cost in region_costs(region, step):
        found.setdefault(_name(node)[1], []).append(cost)
    return found


def passed(region):
    run_passes(region, cpu_pipeline())
    return region


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_attention_of_a_layer(dtype):
    size = dtype.itemsize
    found = costs(passed(layer_graph(CONFIG, dtype)))
    products = found["packed_linear"]
    shapes = [(E, (H + 2 * K) * D), (H * D, E), (E, 2 * FF), (FF, E)]
    for cost, (inner, columns) in zip(products, shapes, strict=True):
        assert cost.unit == "cube" and cost.dtype == str(dtype).removeprefix("torch.")
        assert cost.flops == 2 * 9 * inner * columns and cost.flops_per_row == 2 * inner * columns
        # Packing pads columns to 32 and, in bfloat16, the inner axis to pairs.
        packed = -(-columns // 32) * 32 * (inner + inner % 2 if size == 2 else inner)
        assert cost.bytes_cold == packed * size
        assert cost.bytes_read == (packed + 9 * inner) * size and cost.bytes_written == 9 * columns * size
    (attention,) = found["attention"]
    pairs = sum(range(11, 16)) + 1 + 2 + 3 + 41
    assert attention.flops == 4 * H * D * pairs
    assert attention.flops_per_row == pytest.approx(4 * H * D * (sum(range(11, 16)) / 5 + 2 + 41))
    assert attention.bytes_cold == (15 + 3 + 41) * 2 * K * D * size
    (write,) = found["qkv_rope_write"]
    qkv = 9 * (H + 2 * K) * D * size
    assert write.unit == "vector" and write.bytes_written == qkv
    # qkv, two head norms, cos and sin, and the step's int32 positions, starts and slots; the cache is not read.
    assert write.bytes_read == qkv + 2 * D * size + 2 * 9 * (D // 2) * 4 + (9 + 4 + 3) * 4
    norm = found["add_rms_norm"][0]
    assert (norm.bytes_read, norm.bytes_written) == ((2 * 9 + 1) * E * size, 2 * 9 * E * size)
    assert all(cost.launches == 0 and not cost.bytes_moved for name in ("view", "getitem") for cost in found[name])


def test_unfused_layer_costs_the_same_products_and_more_moves():
    fused, plain = passed(layer_graph(CONFIG)), layer_graph(CONFIG)
    before, after = costs(plain), costs(fused)
    flops = sum(cost.flops for cost in before["linear"])
    assert flops == sum(cost.flops for cost in after["packed_linear"])
    vector = [
        sum(c.bytes_moved for cs in found.values() for c in cs if c.unit == "vector") for found in (before, after)
    ]
    assert vector[0] > vector[1]


@pytest.mark.parametrize("index", [1, 2])
def test_a_layer_lowered_for_the_npu_costs_the_same_products_attention_and_write(index):
    """The second kind of layer attends to a window."""
    config = family_config("qwen2", sliding_window=4)
    captured, lowered = (family_regions(config, torch.bfloat16)[index] for _ in range(2))
    run_passes(lowered, npu_pipeline(max_model_len=40960))
    before, after = costs(captured), costs(lowered)
    assert after["npu_fused_infer_attention_score"] == before["attention"]
    assert sum(cost.flops for cost in after["npu_linear"]) == sum(cost.flops for cost in before["linear"])
    assert sum(cost.bytes_cold for cost in after["npu_linear"]) == sum(cost.bytes_cold for cost in before["linear"])
    assert sum(cost.bytes_written for cost in after["npu_scatter_nd_update_"]) == before["kv_write"][0].bytes_written


def test_every_operator_of_the_npu_has_a_rule():
    assert set(npu.SCHEMAS) <= set(_RULES)


def test_head_and_embedding():
    found = costs(passed(head_graph(CONFIG)))
    (product,) = found["packed_linear"]
    assert product.flops == 2 * 2 * E * CONFIG.vocab_size
    (gather,) = costs(embed_graph(CONFIG))["embedding"]
    # Nine rows of the table, not the table.
    assert gather.unit == "copy" and gather.bytes_read == gather.bytes_cold == gather.bytes_written == 9 * E * 4


def test_padding_costs_products_but_no_attention():
    region = passed(layer_graph(CONFIG))
    padded = StepShape(sequences=STEP.sequences, num_logits=2, padded_tokens=16)
    exact, wider = costs(region), costs(region, padded)
    assert wider["packed_linear"][0].flops == 16 / 9 * exact["packed_linear"][0].flops
    assert wider["attention"][0].flops == exact["attention"][0].flops
    assert costs(region, StepShape(padded_tokens=4))["attention"][0].flops == 0


def test_windows_bound_keys_and_pairs():
    step = StepShape(sequences=((4, 10), (1, 10)))
    assert step.keys_read() == 20 and step.keys_read(window=3) == 6 + 3
    for new, context in step.sequences:
        for window in (0, 1, 3, 8, 50):
            seen = sum(
                min(position + 1, window) if window else position + 1 for position in range(context - new, context)
            )
            assert step.query_keys(new, context, window) == seen


def test_collectives_count_what_a_ring_sends():
    def layer(inputs, weights):
        partial_sum = F.linear(inputs["x"], weights["w"])
        total = torch.ops._c10d_functional.all_reduce(partial_sum, "sum", "0")
        return (torch.ops._c10d_functional.wait_tensor(total),)

    region = region_graph(layer, {"x": ("T", 8)}, {"w": (16, 8)})
    for world, sent, messages in ((1, 0, 0), (2, 1.0, 2), (4, 1.5, 6)):
        found = costs(region, StepShape.of(tokens=6, world_size=world))
        (reduce,) = found["all_reduce"]
        assert reduce.unit == "communication" and reduce.messages == messages
        assert reduce.bytes_link == sent * 6 * 16 * 4
        assert found["wait_tensor"][0].launches == 0


def test_plain_products_of_every_form():
    def layer(inputs, weights):
        x, w, b = inputs["x"], weights["w"], weights["b"]
        grouped = torch.bmm(x.unsqueeze(0).expand(3, -1, -1), weights["experts"])
        return torch.mm(x, w), torch.addmm(b, x, w), torch.matmul(x, w), grouped

    region = region_graph(layer, {"x": ("T", 8)}, {"w": (8, 6), "b": (6,), "experts": (3, 8, 4)})
    found = costs(region, StepShape.of(tokens=5))
    flops = {name: cost[0].flops for name, cost in found.items() if cost[0].unit == "cube"}
    assert flops == {"mm": 480, "addmm": 480, "matmul": 480, "bmm": 960} or flops == {
        "mm": 480,
        "addmm": 480,
        "bmm": 960,
    }
    assert found["bmm"][0].flops_per_row == 192 and found["bmm"][0].bytes_cold == 3 * 8 * 4 * 4


@pytest.mark.parametrize(("scheme", "size"), [("int8-dynamic", 1), ("int4-dynamic", 0.5)])
def test_products_of_rounded_activations_compute_in_int8(scheme, size):
    config = family_config("qwen3", hidden_size=96, intermediate_size=160, head_dim=32)
    region = layer_graph(config, torch.bfloat16)
    run_passes(region, cpu_pipeline(quantisation=Quantisation(scheme=scheme)))
    products = costs(region)[f"{scheme.replace('-', '_')}_linear"]
    assert len(products) == 4 and {cost.dtype for cost in products} == {"int8"}
    # The last one; scales are float32 of a column, or bfloat16 of 32 inputs.
    scales = 96 * 4 if size == 1 else 96 * 160 // 32 * 2
    assert products[3].bytes_cold == 96 * 160 * size + scales and products[3].flops == 2 * 9 * 96 * 160


def test_every_operator_of_ours_has_a_rule():
    """Called through a region of its own, because a rule looks at arguments."""
    regions = [*family_regions(CONFIG, torch.float32), *map(passed, family_regions(CONFIG, torch.float32))]
    seen = {_name(node)[1] for region in regions for node, _ in region_costs(region, STEP) if _name(node)[0] == "xllm"}
    assert {f"xllm::{name}" for name in SCHEMAS} <= _RULES.keys()
    assert seen >= {"packed_linear", "attention", "rms_norm", "add_rms_norm", "silu_mul", "rope", "kv_write"}


def test_an_operator_without_a_rule_is_named():
    LIBRARY.define("test_only_no_rule(Tensor x) -> Tensor")
    LIBRARY.impl("test_only_no_rule", lambda x: x.clone(), "CompositeExplicitAutograd")
    torch.library.register_fake("xllm::test_only_no_rule", torch.clone, lib=LIBRARY)
    region = region_graph(lambda inputs, _: (torch.ops.xllm.test_only_no_rule(inputs["x"]),), {"x": ("T", 4)})
    with pytest.raises(UnknownCostError, match="xllm::test_only_no_rule"):
        region_costs(region, STEP)


def test_a_step_is_its_regions_times_their_runs():
    model = CostModel(spec=device_spec("cpu-avx512"))
    embed, layer, head = family_regions(CONFIG, torch.float32)
    whole = step_seconds([(embed, 1), (layer, 3), (head, 1)], STEP, model)
    parts = region_seconds(embed, STEP, model) + 3 * region_seconds(layer, STEP, model)
    parts += region_seconds(head, STEP, model) + model.spec.step_overhead_s
    assert whole == pytest.approx(parts)
    # More tokens, and longer contexts, take longer.
    longer = StepShape(sequences=((5, 1500), (3, 300), (1, 4100)), num_logits=2)
    assert step_seconds([(layer, 1)], longer, model) > step_seconds([(layer, 1)], STEP, model)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"sequences": ((5, 4),)}, "5 new tokens and context 4"),
        ({"sequences": ((5, 9),), "padded_tokens": 4}, "padded_tokens=4"),
        ({"num_logits": 3, "padded_logits": 2}, "padded_logits=2"),
        ({"world_size": 0}, "world_size=0"),
    ],
)
def test_impossible_steps(values, said):
    with pytest.raises(ValueError, match=said):
        StepShape(**values)
