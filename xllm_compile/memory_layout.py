"""The memory plan of a whole artifact: a layout per graph, and the size of the pool that they share."""

from collections.abc import Sequence

from xllm_compile.graph_passes.memory_plan import GraphPlan, Lifetimes, plan_graph, plan_step
from xllm_compile.report.charts import Block


def plan_graphs(
    regions: Sequence[Lifetimes], token_buckets: Sequence[int], logits_buckets: Sequence[int], max_tokens: int
) -> list[GraphPlan]:
    """Of each region for each of its buckets, and for the largest step there is."""
    plans = []
    for region in regions:
        for sizes in step_sizes(token_buckets, logits_buckets, max_tokens, is_head=region.region == "head"):
            plans.append(plan_graph(region, sizes))
    return plans


def step_sizes(
    token_buckets: Sequence[int], logits_buckets: Sequence[int], max_tokens: int, *, is_head: bool
) -> list[dict[str, int]]:
    if is_head:
        return [{"T": max_tokens, "R": rows} for rows in sorted({1, *logits_buckets})]
    return [{"T": tokens} for tokens in sorted({*token_buckets, max_tokens})]


def pool_bytes(
    regions: Sequence[tuple[Lifetimes, Sequence[int]]],
    token_buckets: Sequence[int],
    logits_buckets: Sequence[int],
    max_tokens: int,
) -> int:
    """What any step needs of the pool, graphs one after the other. ``regions``: embed first, head last, each with the
    layers that run it."""
    (embed, _), *layers, (head, _) = regions
    in_order = [region for layer in sorted({n for _, ns in layers for n in ns}) for region, ns in layers if layer in ns]
    num_state = len(in_order[-1].outputs)
    rows = max([1, *logits_buckets])
    return max(
        plan_step(embed, in_order, head, {"T": tokens, "R": min(rows, tokens)}, num_state)
        for tokens in {*token_buckets, max_tokens}
    )


def blocks(region: Lifetimes, plan: GraphPlan) -> list[Block]:
    """For the report's chart."""
    return [
        Block(
            name=buffer.name,
            offset=plan.offsets[buffer.name][0],
            size=plan.offsets[buffer.name][1],
            first=max(buffer.first, 0),
            last=region.end if buffer.name in region.outputs or buffer.first < 0 else buffer.last,
        )
        for buffer in region.buffers
    ]
