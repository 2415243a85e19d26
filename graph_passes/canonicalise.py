"""Remove what export leaves behind so that every later pattern has one spelling.

Matches: contiguous, clone, alias and detach; views and casts that change nothing; asserts
    on symbolic sizes (the runtime, not the graph, guarantees shapes).
Rewrites: uses read the operand; dead code is dropped.
Skips: a copy of a value that the graph writes to.
Numerics: bitwise.
"""

import torch
from torch import fx

from xllm_compile.graph_passes.region import PassReport, RegionGraph, args_of

aten = torch.ops.aten

_IDENTITIES = {
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
}
_IDENTITY_IF_UNCHANGED = {
    aten.view.default,
    aten.reshape.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.expand.default,
}
_ASSERTIONS = {
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range_for_size.default,
}


def canonicalise(region: RegionGraph) -> PassReport:
    report = PassReport(name="canonicalise", region=region.name)
    for node in list(region.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _ASSERTIONS:
            region.graph.erase_node(node)
            report.matches += 1
        elif _is_identity(node) and _is_written(args_of(node)[0]):
            report.skip("copy of a value that is written")
        elif _is_identity(node):
            node.replace_all_uses_with(args_of(node)[0])
            region.graph.erase_node(node)
            report.matches += 1
    region.finish()
    return report


def _is_written(value: fx.Node) -> bool:
    """Whether an operator of the graph writes to the value."""
    return any(
        isinstance(user.target, torch._ops.OpOverload)
        and any(
            schema.alias_info is not None and schema.alias_info.is_write and given is value
            for schema, given in zip(user.target._schema.arguments, user.args, strict=False)
        )
        for user in value.users
    )


def _is_identity(node: fx.Node) -> bool:
    if node.target in _IDENTITIES:
        return True
    if node.target not in _IDENTITY_IF_UNCHANGED:
        return False
    before, after = args_of(node)[0].meta["val"], node.meta["val"]
    return bool(before.dtype == after.dtype and tuple(before.shape) == tuple(after.shape))
