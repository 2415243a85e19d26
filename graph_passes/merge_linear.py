"""One matrix product where several read the same input: q, k, v become one, gate and up become one.

Matches: two or more aten.linear on one input whose weights (and biases) are used nowhere else.
Rewrites: one linear on the weights concatenated along the output axis, split back by split_with_sizes.
Skips: a weight that is shared, computed or already packed; some with bias and some without.
Numerics: each output is the same dot product: bitwise on kernels that sum alike whatever the number of outputs, which
    ours do.
"""

import operator

import torch
from torch import fx

from xllm_compile.graph_passes.region import PassReport, RegionGraph, args_of, insert_call
from xllm_compile.runtime.ops.spec import WeightSpec

aten = torch.ops.aten


def merge_linear(region: RegionGraph) -> PassReport:
    report = PassReport(name="merge_linear", region=region.name)
    for siblings in _sibling_groups(region, report):
        _merge(region, siblings)
        report.matches += 1
    region.finish()
    return report


def _sibling_groups(region: RegionGraph, report: PassReport) -> list[list[fx.Node]]:
    """Linears that can be merged, grouped by input, in graph order."""
    by_input: dict[fx.Node, list[fx.Node]] = {}
    for node in region.graph.find_nodes(op="call_function", target=aten.linear.default):
        by_input.setdefault(args_of(node)[0], []).append(node)
    groups = []
    for siblings in by_input.values():
        if len(siblings) < 2:
            continue
        operands = [operand for node in siblings for operand in args_of(node)[1:] if operand is not None]
        if any(region.weight_of(operand) is None or len(operand.users) > 1 for operand in operands):
            report.skip("weight shared or not a plain weight")
        elif len({_bias(node) is None for node in siblings}) > 1:
            report.skip("bias on some only")
        else:
            groups.append(siblings)
    return groups


def _merge(region: RegionGraph, siblings: list[fx.Node]) -> None:
    weight = _concatenate(region, [args_of(node)[1] for node in siblings])
    biases = [bias for bias in map(_bias, siblings) if bias is not None]
    bias = _concatenate(region, biases) if biases else None
    sizes = [args_of(node)[1].meta["val"].shape[0] for node in siblings]
    first = siblings[0]
    merged = insert_call(region.graph, first, aten.linear.default, args_of(first)[0], weight, bias)
    parts = insert_call(region.graph, first, aten.split_with_sizes.default, merged, sizes, -1)
    for index, node in enumerate(siblings):
        with region.graph.inserting_before(first):
            part = region.graph.call_function(operator.getitem, (parts, index))
        part.meta["val"] = parts.meta["val"][index]
        node.replace_all_uses_with(part)
    for node in siblings:
        region.graph.erase_node(node)


def _concatenate(region: RegionGraph, placeholders: list[fx.Node]) -> fx.Node:
    specs = [region.weights[node.name] for node in placeholders]
    value = torch.cat([node.meta["val"] for node in placeholders])
    spec = WeightSpec(
        name=_merged_name([spec.name for spec in specs]),
        sources=tuple(source for spec in specs for source in spec.sources),
        shape=tuple(value.shape),
        dtype=specs[0].dtype,
        shards=tuple(shard for spec in specs for shard in spec.source_shards),
    )
    return region.replace_weights(placeholders, spec, value)


def _merged_name(names: list[str]) -> str:
    """'a.q_proj.weight', 'a.k_proj.weight' -> 'a.q_proj+k_proj.weight'."""
    prefix, _, tail = names[0].rpartition(".")
    scope, _, _ = prefix.rpartition(".")
    modules = [name.rpartition(".")[0].rpartition(".")[2] for name in names]
    return f"{scope}.{'+'.join(modules)}.{tail}"


def _bias(node: fx.Node) -> fx.Node | None:
    return args_of(node)[2] if len(args_of(node)) > 2 else None
