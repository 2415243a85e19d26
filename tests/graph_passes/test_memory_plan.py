import pytest
import torch

from tests.graph_passes.regions import apply, family_config, family_regions, layer_graph, region_graph
from xllm_compile.graph_passes.memory_plan import ALIGNMENT, Arena, lifetimes, plan_graph, plan_step
from xllm_compile.graph_passes.partition import partition
from xllm_compile.graph_passes.pipeline import cpu_pipeline, run_passes

SIZES = [{"T": 1, "R": 1}, {"T": 7, "R": 2}, {"T": 64, "R": 8}]


def compiled_regions(family):
    regions = family_regions(family_config(family), torch.bfloat16)
    for region in regions:
        run_passes(region, cpu_pipeline())
    return regions


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("sizes", SIZES)
def test_no_two_buffers_that_live_together_overlap(family, sizes):
    for region in compiled_regions(family):
        found, report = lifetimes(region)
        assert report.matches == len(found.buffers) > 0 and not report.skips
        plan = plan_graph(found, sizes)
        ends = []
        for index, one in enumerate(found.buffers):
            low, size = plan.offsets[one.name]
            assert low % ALIGNMENT == 0 and size % ALIGNMENT == 0 and size >= one.num_bytes(sizes) > 0
            ends.append(low + size)
            for other in found.buffers[:index]:
                if one.first <= other.last and other.first <= one.last:
                    start, length = plan.offsets[other.name]
                    assert low + size <= start or start + length <= low, (one, other)
        assert plan.peak_bytes == max(ends)
        assert plan.live_bytes <= plan.peak_bytes <= 1.5 * plan.live_bytes


def test_a_layer_by_hand():
    """Rows of 288, as the demo model's: the widest moment is the feed-forward."""
    config = family_config("qwen3", hidden_size=288, intermediate_size=768, num_attention_heads=6, head_dim=64)
    region = layer_graph(config, torch.bfloat16)
    run_passes(region, cpu_pipeline())
    plan = plan_graph(lifetimes(region)[0], {"T": 32})
    row, rotary = 288 * 2, 2 * 32 * 4
    # delta, residual, cos and sin are the caller's; then the new residual, gate and up, and their product.
    assert plan.live_bytes == 32 * (2 * row + rotary + row + 2 * 768 * 2 + 768 * 2)


def test_a_view_takes_no_room_of_its_own():
    def function(inputs, weights):
        doubled = inputs["x"] * 2
        first, second = doubled.view(-1, 8).split_with_sizes([3, 5], -1)
        return (first.sum(-1) + second.sum(-1),)

    found, _ = lifetimes(region_graph(function, {"x": ("T", 2, 4)}))
    assert [buffer.name for buffer in found.buffers] == ["x", "mul", "sum_1", "sum_2", "add"]
    product = found.buffers[1]
    # Alive until the second part of it was read.
    assert product.last == found.buffers[3].first


def test_a_size_of_no_symbol_is_not_planned():
    def function(inputs, weights):
        return (torch.cat([inputs["x"], inputs["x"]]).sum(0) * 2,)

    found, report = lifetimes(region_graph(function, {"x": ("T", 4)}))
    assert report.skips == {"size of no symbol": 1}
    assert [buffer.name for buffer in found.buffers] == ["x", "sum_1", "mul"]


def test_the_plan_changes_nothing_and_a_second_one_is_the_same():
    region = layer_graph(family_config("qwen3"))
    code = region.module.code
    first, second = (lifetimes(region)[0] for _ in range(2))
    assert first == second and region.module.code == code
    apply(lambda graph: lifetimes(graph)[1], region)


def test_best_fit_takes_the_smallest_hole_and_joins_neighbours():
    arena = Arena()
    a, b, c, d = (arena.take(size) for size in (300, 50, 100, 50))
    assert (a, b, c, d) == (0, 300, 350, 450)
    arena.free(a)
    arena.free(c)
    assert arena.take(90) == c
    assert arena.take(300) == a
    assert arena.peak_bytes == 500
    arena.free(b)
    arena.free(a)
    assert arena.take(350) == 0
    assert (arena.live_bytes, arena.max_live_bytes) == (490, 500)


@pytest.mark.parametrize("is_partial", [False, True])
def test_a_step_needs_the_largest_graph_and_not_the_sum(is_partial):
    embed, layer, head = compiled_regions("qwen3")
    pieces = partition(layer)[0] if is_partial else [layer]
    plans = [lifetimes(piece)[0] for piece in pieces]
    ends = [lifetimes(region)[0] for region in (embed, head)]
    sizes = {"T": 64, "R": 1}
    alone = [plan_graph(plan, sizes).peak_bytes for plan in (*plans, *ends)]
    found = [plan_step(ends[0], plans * layers, ends[1], sizes, 2) for layers in (1, 2, 3, 28)]
    # Where the state lies alternates; from the third layer on nothing moves any more.
    assert found[2] == found[3]
    assert max(alone) <= found[3] <= 1.5 * max(alone) < sum(alone)
