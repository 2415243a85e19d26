"""NPU lowering: our operators and linear layers on torch_npu's fused ones, as TorchAir's GE graphs want them.

Matches: xllm::rms_norm, add_rms_norm, silu_mul, rope, kv_write, attention; aten.linear; the all-reduce of a product;
    the step metadata among a region's inputs; nodes that a scheduling pass gave a stream or a share of the cores. A
    layer on two halves of a step has each of these twice.
Rewrites: npu_rms_norm, npu_add_rms_norm, npu_swiglu, npu_rotary_mul, npu_scatter_nd_update_ on the flat cache,
    npu_fused_infer_attention_score (TND, causal, paged), npu_linear, npu_mm_all_reduce_base. Inputs become those of
    runtime/ops/npu.py. ``meta["stream"]`` (a label) and ``meta["core_share"]`` ({"cube": n, "vector": m}) become
    scope_enter and scope_exit around the nodes: what torchair.scope's context managers leave in a graph.
Skips: an all-reduce on a stream of its own (it overlaps computation), of no product, in float32, with a bias, or that
    is no sum: the functional collective stays. What has no operator here (partly rotated heads) stays; compiling
    then names it.
Numerics: the rotary embedding multiplies in the model's dtype, by cos and sin rounded to it; float32 to the order of
    summation. Rows of no sequence hold anything, where the CPU's hold zeros.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from xllm_compile.graph_passes.region import PassReport, RegionGraph, args_of
from xllm_compile.runtime.ops.npu import BLOCK_TOKENS, MASK_SIZE, declare_operators
from xllm_compile.runtime.ops.spec import TensorSpec

aten = torch.ops.aten
air = torch.ops.air
npu = torch.ops.npu
xllm = torch.ops.xllm
_ALL_REDUCE = torch.ops._c10d_functional.all_reduce.default

_CAUSAL, _BAND = 3, 4
"""Values of sparse_mode: everything up to the query's own position, and a window of it."""
_LABELS = ("stream", "core_share")


def lower_npu(region: RegionGraph, *, num_blocks: int, blocks_per_seq: int) -> PassReport:
    """``num_blocks`` of the whole KV cache, ``blocks_per_seq`` that one sequence can own."""
    declare_operators()
    report = PassReport(name="lower_npu", region=region.name)
    if region.name.partition(".")[0] == "embed":
        report.matches += _return_full_cos_sin(region)
    rows = {
        xllm.rms_norm.default: _lower_rms_norm,
        xllm.add_rms_norm.default: _lower_add_rms_norm,
        xllm.silu_mul.default: _lower_silu_mul,
        aten.linear.default: _lower_linear,
    }
    for node in list(region.graph.find_nodes(op="call_function", target=_ALL_REDUCE)):
        report.matches += _fuse_all_reduce(region, node, report)
    for target, lower in rows.items():
        for node in list(region.graph.find_nodes(op="call_function", target=target)):
            lower(region, node)
            report.matches += 1
    report.matches += _lower_step(region, num_blocks, blocks_per_seq, report)
    report.matches += _insert_scopes(region)
    region.finish()
    return report


def _call(region: RegionGraph, before: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Insert a call with its value; on the stream and cores of the node it stands for."""
    with region.graph.inserting_before(before):
        node = region.graph.call_function(target, args, kwargs)
    values, options = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    with next(n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta["val"], FakeTensor)).fake_mode:
        node.meta["val"] = target(*values, **options)
    node.meta |= {label: before.meta[label] for label in _LABELS if label in before.meta}
    return node


def _part(region: RegionGraph, before: fx.Node, source: fx.Node, index: int) -> fx.Node:
    with region.graph.inserting_before(before):
        node = region.graph.call_function(operator.getitem, (source, index))
    node.meta["val"] = source.meta["val"][index]
    return node


def _replace(region: RegionGraph, node: fx.Node, new: fx.Node) -> None:
    node.replace_all_uses_with(new)
    region.graph.erase_node(node)


def _lower_rms_norm(region: RegionGraph, node: fx.Node) -> None:
    fused = _call(region, node, npu.npu_rms_norm.default, *args_of(node))
    _replace(region, node, _part(region, node, fused, 0))


def _lower_add_rms_norm(region: RegionGraph, node: fx.Node) -> None:
    fused = _call(region, node, npu.npu_add_rms_norm.default, *args_of(node))
    # Ours returns (normed, sum), theirs (normed, 1/rms, sum).
    parts = [_part(region, node, fused, index) for index in (0, 2)]
    for user in list(node.users):
        _replace(region, user, parts[args_of(user)[1]])
    region.graph.erase_node(node)


def _lower_silu_mul(region: RegionGraph, node: fx.Node) -> None:
    _replace(region, node, _call(region, node, npu.npu_swiglu.default, *args_of(node)))


def _lower_linear(region: RegionGraph, node: fx.Node) -> None:
    _replace(region, node, _call(region, node, npu.npu_linear.default, *args_of(node)))


def _fuse_all_reduce(region: RegionGraph, node: fx.Node, report: PassReport) -> bool:
    """wait(all_reduce(linear(x, w))) -> npu_mm_all_reduce_base(x, w.t())."""
    product, kind, group = args_of(node)
    (wait,) = node.users
    if node.meta.get("stream"):
        report.skip("all-reduce overlaps computation")
    elif not (isinstance(product, fx.Node) and product.target is aten.linear.default and len(product.users) == 1):
        report.skip("all-reduce of no product")
    elif any(argument is not None for argument in args_of(product)[2:]) or kind != "sum":
        report.skip("all-reduce of a product with a bias, or no sum")
    elif product.meta["val"].dtype == torch.float32:
        report.skip("all-reduce of a float32 product")
    else:
        x, weight = args_of(product)[:2]
        transposed = _call(region, wait, aten.t.default, weight)
        _replace(region, wait, _call(region, wait, npu.npu_mm_all_reduce_base.default, x, transposed, group))
        region.graph.erase_node(node)
        region.graph.erase_node(product)
        return True
    return False


def _return_full_cos_sin(region: RegionGraph) -> int:
    """cos and sin leave the embed region as npu_rotary_mul takes them, so that no layer converts them again."""
    output = region.graph.output_node()
    (values,) = args_of(output)
    dtype = values[0].meta["val"].dtype
    full = [*values]
    for index in (-2, -1):
        if values[index].meta["val"].dim() != 2:
            return 0
        repeated = _call(region, output, aten.cat.default, [values[index], values[index]], -1)
        cast = _call(region, output, aten._to_copy.default, repeated, dtype=dtype)
        full[index] = _call(region, output, aten.view.default, cast, [1, -1, 1, repeated.meta["val"].shape[1]])
    output.args = (tuple(full),)
    return 2


def _lower_step(region: RegionGraph, num_blocks: int, blocks_per_seq: int, report: PassReport) -> int:
    """Rotary embedding, KV write and attention of the step or of its halves, and the inputs they read. Returns the
    number of operators replaced."""
    writes = list(region.graph.find_nodes(op="call_function", target=xllm.kv_write.default))
    attentions = list(region.graph.find_nodes(op="call_function", target=xllm.attention.default))
    if not writes and not attentions:
        return 0
    parts = [node.meta.get("micro_batch") for node in attentions]
    if parts not in ([None], [0, 1]) or [node.meta.get("micro_batch") for node in writes] != parts:
        report.skip("more than one attention, or none for the write")
        return 0
    ropes = list(region.graph.find_nodes(op="call_function", target=xllm.rope.default))
    cache = args_of(writes[0])[2].meta["val"]
    _, _, _, kv_heads, head_dim = cache.shape
    if any(2 * args_of(rope)[1].meta["val"].shape[1] != head_dim for rope in ropes):
        report.skip("heads are rotated in part")
        return 0
    inputs = _replace_inputs(region, num_blocks, blocks_per_seq, kv_heads * head_dim, parts)
    rotations = _rotations(region, inputs, parts)
    for rope in ropes:
        x = args_of(rope)[0]
        heads = x.meta["val"].shape[1]
        rows = _call(region, rope, aten.view.default, x, [1, -1, heads, head_dim])
        rotation = rotations[rope.meta.get("micro_batch")]
        rotated = _call(region, rope, npu.npu_rotary_mul.default, rows, *rotation)
        _replace(region, rope, _call(region, rope, aten.view.default, rotated, [-1, heads, head_dim]))
    _lower_writes(region, writes, inputs, kv_heads * head_dim)
    for part, attention in zip(parts, attentions, strict=True):
        lengths = inputs[_of_part("query_end", part)], inputs[_of_part("kv_len", part)]
        _lower_attention(region, attention, inputs, lengths, kv_heads, head_dim)
    # What cut the old metadata in halves.
    region.graph.eliminate_dead_code()
    _drop_old_inputs(region)
    return len(ropes) + 2 * len(parts) + 1


def _of_part(name: str, part: int | None) -> str:
    return name if part is None else f"{name}_{part}"


def _rotations(
    region: RegionGraph, inputs: dict[str, fx.Node], parts: list[int | None]
) -> dict[int | None, list[fx.Node]]:
    """cos and sin of each part's rows."""
    whole = [inputs["cos"], inputs["sin"]]
    if parts == [None]:
        return {None: whole}
    first = next(node for node in region.graph.nodes if node.op == "call_function")
    sizes = []
    for part in parts:
        with region.graph.inserting_before(first):
            size = region.graph.call_function(aten.sym_size.int, (region.placeholder(f"delta_{part}"), 0))
        size.meta["val"] = region.placeholder(f"delta_{part}").meta["val"].shape[0]
        sizes.append(size)
    cut = [_call(region, first, aten.split_with_sizes.default, rows, sizes, 1) for rows in whole]
    return {part: [_part(region, first, rows, index) for rows in cut] for index, part in enumerate(parts)}


def _lower_writes(region: RegionGraph, writes: list[fx.Node], inputs: dict[str, fx.Node], width: int) -> None:
    """One write for all parts: TorchAir writes an input in place that is written once, and copies the whole cache for a
    second time. What half 1's rows are made from moves ahead of half 0's attention, which does not look at them."""
    first = writes[0]
    for write in writes[1:]:
        _move_before(region, first, args_of(write)[:2])
    for position, cache in enumerate(("k_cache", "v_cache")):
        rows = [_call(region, first, aten.view.default, args_of(write)[position], [-1, width]) for write in writes]
        whole = rows[0] if len(rows) == 1 else _call(region, first, aten.cat.default, rows)
        # On the input itself: through a view of it the whole cache would be copied in and out.
        _call(region, first, npu.npu_scatter_nd_update_.default, inputs[cache], inputs["write_at"], whole)
    for write in writes:
        region.graph.erase_node(write)


def _move_before(region: RegionGraph, place: fx.Node, values: Sequence[fx.Node]) -> None:
    """Move what ``values`` are made from ahead of ``place``, in the order it has."""
    wanted: set[fx.Node] = set()
    open_nodes = list(values)
    while open_nodes:
        node = open_nodes.pop()
        if node not in wanted and place < node:
            wanted.add(node)
            open_nodes += node.all_input_nodes
    for node in [node for node in region.graph.nodes if node in wanted]:
        place.prepend(node)


def _lower_attention(
    region: RegionGraph,
    attention: fx.Node,
    inputs: dict[str, fx.Node],
    lengths: tuple[fx.Node, fx.Node],
    kv_heads: int,
    head_dim: int,
) -> None:
    query, _, _, _, _, scale, window = args_of(attention)
    blocks = [
        _call(region, attention, aten.view.default, inputs[name], [-1, BLOCK_TOKENS, kv_heads * head_dim])
        for name in ("k_cache", "v_cache")
    ]
    # The band reaches window - 1 tokens back from each query and none ahead, counted from the end of the sequence.
    band = {"pre_tokens": window - 1, "next_tokens": 0} if window else {}
    fused = _call(
        region,
        attention,
        air.npu_fused_infer_attention_score.default,
        query,
        *blocks,
        atten_mask=inputs["causal_mask"],
        actual_seq_lengths=lengths[0],
        actual_seq_lengths_kv=lengths[1],
        block_table=inputs["block_table"],
        num_heads=query.meta["val"].shape[1],
        scale=scale,
        input_layout="TND",
        num_key_value_heads=kv_heads,
        sparse_mode=_BAND if window else _CAUSAL,
        block_size=BLOCK_TOKENS,
        **band,
    )
    _replace(region, attention, _part(region, attention, fused, 0))


def _replace_inputs(
    region: RegionGraph, num_blocks: int, blocks_per_seq: int, width: int, parts: list[int | None]
) -> dict[str, fx.Node]:
    """The new inputs by name, after the state; those that nothing will read still stand."""
    tokens = region.placeholder("positions").meta["val"]
    sequences = region.placeholder("slot").meta["val"]
    head_dim = 2 * region.placeholder("cos").meta["val"].shape[1]
    state = [spec for spec in region.inputs if spec.name.split("_")[0] in ("delta", "residual")]
    dtype = state[0].dtype
    specs = [
        TensorSpec(name="cos", shape=(1, "T", 1, head_dim), dtype=dtype),
        TensorSpec(name="sin", shape=(1, "T", 1, head_dim), dtype=dtype),
        TensorSpec(name="write_at", shape=("T", 1), dtype="int32"),
        *(
            TensorSpec(name=_of_part(name, part), shape=("S",), dtype="int64")
            for part in parts
            for name in ("query_end", "kv_len")
        ),
        TensorSpec(name="block_table", shape=("S", blocks_per_seq), dtype="int32"),
        TensorSpec(name="causal_mask", shape=(MASK_SIZE, MASK_SIZE), dtype="int8"),
        TensorSpec(name="k_cache", shape=(num_blocks * BLOCK_TOKENS, width), dtype=dtype),
        TensorSpec(name="v_cache", shape=(num_blocks * BLOCK_TOKENS, width), dtype=dtype),
    ]
    sizes = {"T": tokens.shape[0], "S": sequences.shape[0]}
    kept = {name: region.placeholder(name) for name in ("cos", "sin")}
    after, new = kept["sin"], dict[str, fx.Node]()
    for spec in specs:
        if spec.name in kept:
            new[spec.name] = kept[spec.name]
        else:
            with region.graph.inserting_after(after):
                after = new[spec.name] = region.graph.placeholder(spec.name)
        shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
        new[spec.name].meta["val"] = tokens.new_empty(shape, dtype=getattr(torch, spec.dtype))
    region.inputs = (*state, *specs)
    return new


def _drop_old_inputs(region: RegionGraph) -> None:
    known = {spec.name for spec in region.inputs} | set(region.weights)
    for node in list(region.graph.find_nodes(op="placeholder")):
        if node.name not in known:
            region.graph.erase_node(node)


def _insert_scopes(region: RegionGraph) -> int:
    """Scopes around the nodes with a stream or a share of cores. Returns how many were opened."""
    current: tuple[list[str], list[str]] | None = None
    opened = 0
    for node in list(region.graph.nodes):
        if node.op not in ("call_function", "output") or node.target is operator.getitem:
            continue
        wanted = _attributes(node)
        if wanted == current:
            continue
        if current is not None:
            _scope(region, node, air.scope_exit.default)
        if wanted is not None:
            _scope(region, node, air.scope_enter.default, *wanted)
            opened += 1
        current = wanted
    return opened


def _attributes(node: fx.Node) -> tuple[list[str], list[str]] | None:
    """Keys and values of the scope the node belongs in; the labels are taken off it."""
    stream, share = (node.meta.pop(label, None) for label in _LABELS)
    attributes: dict[str, str] = {}
    # Stream 0 is the main one, which has no label.
    if stream:
        attributes |= {
            "_user_stream_label": str(stream),
            "_user_stream_priority": "0",
            "_enable_inner_parallel": "True",
        }
    if share is not None:
        attributes |= {"_op_aicore_num": str(share["cube"]), "_op_vectorcore_num": str(share["vector"])}
    return (list(attributes), list(attributes.values())) if attributes else None


def _scope(region: RegionGraph, before: fx.Node, target: Any, *args: Sequence[str]) -> None:
    with region.graph.inserting_before(before):
        region.graph.call_function(target, args).meta["val"] = None
