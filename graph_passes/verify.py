"""The executable specification of a region's graph, run before the first and after every pass."""

import operator

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from xllm_compile.graph_passes.region import RegionGraph, args_of
from xllm_compile.runtime.ops.collectives import ALL_REDUCE, WAIT

# Operators that read a cache, and where it is among their arguments.
_READS_CACHE = {"xllm.attention.default": (1,), "air.npu_fused_infer_attention_score.default": (1, 2)}


class GraphVerificationError(AssertionError):
    """A graph breaks the contract between passes; names the pass after which it was seen."""


def verify_graph(region: RegionGraph, *, after: str) -> None:
    """Raises GraphVerificationError unless

    - placeholders are exactly the region's inputs, in order, then its weights, each of the shape its spec says;
    - every value is known (``meta["val"]``) and is what its operator gives for its arguments' values;
    - a cache is written at most once by each micro-batch, in their order, before that micro-batch reads it and after
      the one before has read it, and as the input it is, not through a view;
    - a sum that is on its way is read by nothing before it is waited for, and is left to the next region only where
      this one waits for what it takes itself;
    - no output is an input or a view of one.
    """
    region.graph.lint()
    _check_placeholders(region, after)
    for node in region.graph.nodes:
        if node.op == "call_function":
            _check_value(region, node, after)
    _check_cache_order(region, after)
    _check_collectives(region, after)
    _check_aliasing(region, after)


def _check_placeholders(region: RegionGraph, after: str) -> None:
    names = [node.name for node in region.graph.find_nodes(op="placeholder")]
    expected = [spec.name for spec in region.inputs] + list(region.weights)
    if names != expected:
        raise GraphVerificationError(f"{region.name} after {after}: placeholders {names}, expected {expected}")
    for name, spec in region.weights.items():
        value = region.placeholder(name).meta["val"]
        if tuple(value.shape) != spec.shape or str(value.dtype) != f"torch.{spec.dtype}":
            raise GraphVerificationError(
                f"{region.name} after {after}: weight {name} is {value.dtype}{list(value.shape)},"
                f" its spec says {spec.dtype}{list(spec.shape)}"
            )


def _check_value(region: RegionGraph, node: fx.Node, after: str) -> None:
    if "val" not in node.meta:
        raise GraphVerificationError(f"{region.name} after {after}: {node} has no value")
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    tensors = [n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta["val"], FakeTensor)]
    if not tensors:
        return
    with tensors[0].fake_mode:
        value = node.target(*args, **kwargs)  # type: ignore[operator]
    said, found = _shapes(node.meta["val"]), _shapes(value)
    if said != found:
        raise GraphVerificationError(f"{region.name} after {after}: {node} says {said}, computes {found}")


def _shapes(value: object) -> list[str]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [f"{v.dtype}{[str(n) for n in v.shape]}" for v in values if isinstance(v, torch.Tensor)]


def _check_cache_order(region: RegionGraph, after: str) -> None:
    written: dict[fx.Node, list[int]] = {}
    unread: set[fx.Node] = set()
    for node in region.graph.nodes:
        half = node.meta.get("micro_batch", 0)
        for position in _READS_CACHE.get(str(node.target), ()):
            cache = _base(args_of(node)[position])
            if half not in written.get(cache, ()):
                raise GraphVerificationError(
                    f"{region.name} after {after}: {node} reads the cache before it is written"
                )
            unread.discard(cache)
        for cache in map(_base, _written_arguments(node)):
            before = written.setdefault(cache, [])
            if half in before:
                raise GraphVerificationError(f"{region.name} after {after}: {node} writes the cache a second time")
            if before and (cache in unread or max(before) > half):
                raise GraphVerificationError(
                    f"{region.name} after {after}: {node} writes the cache before the micro-batch ahead of it is done"
                )
            before.append(half)
            unread.add(cache)


def _check_collectives(region: RegionGraph, after: str) -> None:
    (outputs,) = region.graph.output_node().args
    for node in region.graph.nodes:
        if node.target is not ALL_REDUCE and not _is_waited_input(node):
            continue
        for user in node.users:
            if user.target is torch.ops.aten.sym_size.int or user.target is WAIT:
                continue
            position = list(outputs).index(node) if user.op == "output" else -1  # type: ignore[arg-type]
            if position < 0 or not _is_waited_input(region.placeholder(region.inputs[position].name)):
                raise GraphVerificationError(
                    f"{region.name} after {after}: {user} reads {node} before it is waited for"
                )
        if not node.users:
            raise GraphVerificationError(f"{region.name} after {after}: nothing waits for {node}")


def _is_waited_input(node: fx.Node) -> bool:
    return node.op == "placeholder" and any(user.target is WAIT for user in node.users)


def _check_aliasing(region: RegionGraph, after: str) -> None:
    for node in region.graph.nodes:
        for argument in _written_arguments(node):
            if argument.op != "placeholder":
                raise GraphVerificationError(
                    f"{region.name} after {after}: {node} writes {argument}, which is no input of the region"
                )
    (outputs,) = region.graph.output_node().args
    for output in outputs:  # type: ignore[union-attr]
        if isinstance(output, fx.Node) and _base(output).op == "placeholder":
            kind = "an input" if output.op == "placeholder" else f"a view of the input {_base(output)}"
            raise GraphVerificationError(f"{region.name} after {after}: output {output} is {kind}")


def _written_arguments(node: fx.Node) -> list[fx.Node]:
    """The arguments that the node's operator says it writes."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return []
    pairs = zip(schema.arguments, node.args, strict=False)
    return [
        value
        for argument, value in pairs
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, fx.Node)
    ]


def _base(node: fx.Node) -> fx.Node:
    """The value that ``node`` is a view of, itself if it is none."""
    while node.op == "call_function":
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or not _is_view(node, source):
            return node
        node = source
    return node


def _is_view(node: fx.Node, source: fx.Node) -> bool:
    if node.target is operator.getitem:
        # A part of a tuple is a view only where the operator returns views.
        return _returns_view(source)
    # aten.to says it may return a view; a cast to another type is a copy.
    is_cast = isinstance(node.meta.get("val"), torch.Tensor) and _dtype(source) != _dtype(node)
    return _returns_view(node) and not is_cast


def _dtype(node: fx.Node) -> torch.dtype | None:
    return getattr(node.meta.get("val"), "dtype", None)


def _returns_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(value.alias_info is not None for value in schema.returns)
