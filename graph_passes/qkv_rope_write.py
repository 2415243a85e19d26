"""Head norm, rotary embedding and KV-cache write of one attention block, in one operator.

Matches: split of one product into q, k, v; each viewed as heads; optional rms_norm on q and k; rope on q and k;
    kv_write of the rotated k and of v. Merging q, k and v comes first.
Rewrites: q = xllm::qkv_rope_write(product, ...), which also writes the cache.
Skips: anything in between, parts of different products, different eps of the two norms.
Numerics: head norm and rope are no longer rounded to the model's dtype in between; bitwise in float32.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from xllm_compile.graph_passes.region import PassReport, RegionGraph, args_of, insert_call

aten = torch.ops.aten
xllm = torch.ops.xllm


@dataclass(frozen=True, kw_only=True, slots=True)
class _Head:
    """One of q, k, v traced back from its last operator to the split it comes from."""

    split: fx.Node
    index: int
    num_heads: int
    norm: Any = None
    eps: float | None = None
    cos: Any = None
    sin: Any = None


def qkv_rope_write(region: RegionGraph) -> PassReport:
    report = PassReport(name="qkv_rope_write", region=region.name)
    for write in region.graph.find_nodes(op="call_function", target=xllm.kv_write.default):
        query = _query_of(write)
        matched = query is not None and _rewrite_if_matched(region, write, query, report)
        if query is None:
            report.skip("no attention reads the cache that is written")
        report.matches += bool(matched)
    region.finish()
    return report


def _query_of(write: fx.Node) -> fx.Node | None:
    """The query of the attention that reads the cache this write fills."""
    cache = args_of(write)[2]
    assert isinstance(cache, fx.Node)
    for user in cache.users:
        if user.target is xllm.attention.default and isinstance(user.args[0], fx.Node):
            return user.args[0]
    return None


def _rewrite_if_matched(region: RegionGraph, write: fx.Node, query: fx.Node, report: PassReport) -> bool:
    key, value, cache, positions, seq_start, slot = args_of(write)
    heads = [_trace(query), _trace(key), _trace(value)]
    q, k, v = heads
    if q is None or k is None or v is None:
        report.skip("an unknown operator between product and cache")
        return False
    if not (q.split is k.split is v.split) or [q.index, k.index, v.index] != [0, 1, 2]:
        report.skip("q, k and v are not parts of one product")
        return False
    if (q.cos, q.sin) != (k.cos, k.sin) or q.cos is None or v.cos is not None or v.norm is not None:
        report.skip("rope is not on q and k alone")
        return False
    if q.eps != k.eps:
        report.skip("head norms differ in eps")
        return False
    product = args_of(q.split)[0]
    args = (product, q.norm, k.norm, q.cos, q.sin, cache, positions, seq_start, slot)
    fused = insert_call(region.graph, write, xllm.qkv_rope_write.default, *args, q.num_heads, k.num_heads, q.eps or 0.0)
    query.replace_all_uses_with(fused)
    region.graph.erase_node(write)
    return True


def _trace(node: Any) -> _Head | None:
    found: dict[str, Any] = {}
    while isinstance(node, fx.Node):
        # From the cache back to the product, each at most once and in this order: rope, head norm, view as heads.
        if node.target is xllm.rope.default and not found:
            node, found["cos"], found["sin"] = args_of(node)
        elif node.target is xllm.rms_norm.default and not {"norm", "num_heads"} & found.keys():
            node, found["norm"], found["eps"] = args_of(node)
        elif node.target is aten.view.default and "num_heads" not in found:
            found["num_heads"] = node.meta["val"].shape[1]
            node = args_of(node)[0]
        elif node.target is operator.getitem and "num_heads" in found:
            split, index = args_of(node)
            if isinstance(split, fx.Node) and split.target is aten.split_with_sizes.default:
                return _Head(split=split, index=index, **found)
            return None
        else:
            return None
    return None
