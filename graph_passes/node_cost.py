"""What each node of a region costs: operations, bytes, launches and the unit it runs on.

Sizes come from ``meta["val"]`` with the symbols of the region's inputs bound to a step's; attention also asks the step
for its sequences, whose lengths no shape tells. Attention counts as cube work: its vector part is hidden behind it.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from xllm_compile.graph_passes.cost_model import CostModel, NodeCost
from xllm_compile.graph_passes.region import RegionGraph, args_of
from xllm_compile.graph_passes.step_shape import StepShape


class UnknownCostError(ValueError):
    """An operator of ours without a cost rule; names the operator."""


_FREE = NodeCost(unit="copy", family="copy", launches=0)
# Another look at the same memory, or no tensor at all.
# fmt: off
_VIEWS = {
    "view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "expand", "permute", "transpose", "t", "flatten",
    "unflatten", "split", "split_with_sizes", "chunk", "slice", "select", "narrow", "unbind", "detach", "alias",
    "sym_size", "sym_numel", "scalar_tensor", "_assert_tensor_metadata",
}
# fmt: on
_COPIES = frozenset(
    ("clone", "cat", "stack", "copy", "copy_", "contiguous", "constant_pad_nd", "repeat", "zeros", "zeros_like", "full")
)
_GATHERS = frozenset(
    ("embedding", "index_select", "gather", "index", "scatter", "scatter_add", "index_add", "index_put")
)
_COLLECTIVES = frozenset({"_c10d_functional", "c10d_functional", "_c10d_functional_autograd"})


def region_costs(region: RegionGraph, step: StepShape) -> list[tuple[fx.Node, NodeCost]]:
    """The cost of every call, in graph order. Raises UnknownCostError, ValueError for a symbol the step lacks."""
    sizes = _bind(region, step)
    caches = frozenset(spec.name for spec in region.inputs if "M" in spec.shape)
    return [
        (node, _node_cost(_Call(node=node, region=region, step=step, sizes=sizes, caches=caches)))
        for node in region.graph.nodes
        if node.op == "call_function"
    ]


def region_seconds(region: RegionGraph, step: StepShape, model: CostModel) -> float:
    """One run of the region, its nodes one after the other."""
    return model.total_seconds(cost for _, cost in region_costs(region, step))


def step_seconds(regions: Iterable[tuple[RegionGraph, int]], step: StepShape, model: CostModel) -> float:
    """A whole step: every region as often as it runs, and the host's work."""
    times = (count * region_seconds(region, step, model) for region, count in regions)
    return model.spec.step_overhead_s + sum(times)


def _bind(region: RegionGraph, step: StepShape) -> dict[Any, int]:
    """Symbols in the graph's shapes -> their sizes in the step."""
    known = step.sizes
    bound: dict[Any, int] = {}
    for spec in region.inputs:
        for size, value in zip(spec.shape, region.placeholder(spec.name).meta["val"].shape, strict=True):
            if isinstance(size, str) and isinstance(value, torch.SymInt):
                if size not in known:
                    raise ValueError(f"region {region.name}: a step has no size {size}; sizes: {', '.join(known)}")
                bound[value.node.expr] = known[size]
                if size in ("TA", "TB"):
                    # A half's size is an expression of the whole step's, which no input may have.
                    bound |= dict.fromkeys(value.node.expr.free_symbols, known["T"])
    return bound


@dataclass(frozen=True, kw_only=True, slots=True)
class _Call:
    """A node with its sizes bound."""

    node: fx.Node
    region: RegionGraph
    step: StepShape
    sizes: dict[Any, int]
    caches: frozenset[str]
    """Inputs that hold what earlier steps wrote."""

    def shape(self, value: torch.Tensor) -> list[int]:
        return [self._size(size) for size in value.shape]

    def num_bytes(self, value: Any) -> int:
        return sum(math.prod(self.shape(v)) * v.element_size() for v in _tensors(value))

    def arg(self, index: int) -> Any:
        args = args_of(self.node)
        return args[index] if index < len(args) else None

    def value(self, index: int) -> torch.Tensor:
        found: torch.Tensor = self.arg(index).meta["val"]
        return found

    def read_bytes(self, skip: Sequence[fx.Node] = ()) -> tuple[int, int]:
        """(all bytes, cold bytes) of the tensor arguments."""
        sizes = [(n, self.num_bytes(n.meta.get("val"))) for n in self.node.all_input_nodes if n not in skip]
        return sum(size for _, size in sizes), sum(size for n, size in sizes if self.is_cold(n))

    def is_cold(self, node: fx.Node) -> bool:
        """Whether the memory is a weight's or a cache's, seen through views."""
        while node.op == "call_function" and _name(node)[1] in _VIEWS and node.all_input_nodes:
            node = node.all_input_nodes[0]
        return self.region.weight_of(node) is not None or node.name in self.caches

    @property
    def written_bytes(self) -> int:
        return self.num_bytes(self.node.meta.get("val"))

    def _size(self, size: Any) -> int:
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = size.node.expr
        found = self.sizes.get(expression)
        return int(expression.xreplace(self.sizes)) if found is None else found


def _tensors(value: Any) -> list[torch.Tensor]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [v for v in values if isinstance(v, torch.Tensor)]


def _name(node: fx.Node) -> tuple[str, str]:
    """(namespace, operator): ("aten", "linear"); ("", "getitem") for Python's own."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return "", getattr(node.target, "__name__", str(node.target))
    namespace, _, name = schema.name.partition("::")
    return namespace, name


def _node_cost(call: _Call) -> NodeCost:
    namespace, name = _name(call.node)
    if namespace == "" or name in _VIEWS:
        return _FREE
    if namespace in _COLLECTIVES:
        return _collective(call, name)
    rule = _RULES.get(f"{namespace}::{name}")
    if rule is not None:
        return rule(call)
    if namespace in ("xllm", "npu", "air"):
        raise UnknownCostError(f"no cost rule for {namespace}::{name}; add one to node_cost._RULES")
    if name in _COPIES:
        return _moved(call, family="copy")
    if name in _GATHERS:
        return _gather(call)
    return _token_wise(call)


def _linear(call: _Call) -> NodeCost:
    """x [..., C] by a weight into [..., N]."""
    x, out = call.shape(call.value(0)), call.shape(call.node.meta["val"])
    return _product(call, rows=math.prod(x[:-1]), inner=x[-1], columns=out[-1])


def _rounded_linear(call: _Call) -> NodeCost:
    """On activations rounded to int8; what int4 weights hold is multiplied as int8, too."""
    return replace(_linear(call), dtype="int8")


def _addmm(call: _Call) -> NodeCost:
    rows, inner = call.shape(call.value(1))
    return _product(call, rows=rows, inner=inner, columns=call.shape(call.value(2))[1])


def _matmul(call: _Call) -> NodeCost:
    """[..., M, K] by [..., K, N]; leading axes are products of their own."""
    x, out = call.shape(call.value(0)), call.shape(call.node.meta["val"])
    if len(out) < 2:
        return _product(call, rows=1, inner=x[-1], columns=math.prod(out))
    # A plain weight on the right makes one product of all leading axes.
    is_batched = call.value(1).dim() > 2
    batch = math.prod(out[:-2]) if is_batched else 1
    rows = out[-2] if is_batched else math.prod(out[:-1])
    return _product(call, rows=rows, inner=x[-1], columns=out[-1], batch=batch)


def _product(call: _Call, *, rows: int, inner: int, columns: int, batch: int = 1) -> NodeCost:
    read, cold = call.read_bytes()
    return NodeCost(
        unit="cube",
        family="linear",
        dtype=_dtype(call),
        flops=2.0 * batch * rows * inner * columns,
        flops_per_row=2.0 * batch * inner * columns,
        outputs=(batch, rows, columns),
        bytes_read=read,
        bytes_cold=cold,
        bytes_written=call.written_bytes,
    )


def _dtype(call: _Call) -> str:
    """What the product is computed in: the first tensor's dtype."""
    first = next(v for n in call.node.all_input_nodes for v in _tensors(n.meta.get("val")))
    return str(first.dtype).removeprefix("torch.")


def _attention(call: _Call) -> NodeCost:
    cache = call.value(1)
    token_bytes = math.prod(call.shape(cache)[2:]) * cache.element_size()
    return _attend(call, token_bytes=token_bytes, window=int(call.arg(6)))


def _npu_attention(call: _Call) -> NodeCost:
    """On blocks [P, 128, K*D] of keys and of values; a window is given as how far back it reaches."""
    keys = call.value(1)
    options: dict[str, Any] = dict(call.node.kwargs)
    token_bytes = 2 * call.shape(keys)[2] * keys.element_size()
    window = options["pre_tokens"] + 1 if "pre_tokens" in options else 0
    return _attend(call, token_bytes=token_bytes, window=window)


def _attend(call: _Call, *, token_bytes: int, window: int) -> NodeCost:
    """Scores and weighted values of each sequence's queries over the keys they see.

    ``token_bytes`` are those of one token's key and value.
    """
    q = call.value(0)
    _, heads, head_dim = call.shape(q)
    pair_flops = 4.0 * heads * head_dim
    pairs = [(new, call.step.query_keys(new, context, window)) for new, context in call.step.sequences]
    keys = call.step.keys_read(window)
    cold = keys * token_bytes
    return NodeCost(
        unit="cube",
        family="attention",
        dtype=_dtype(call),
        flops=pair_flops * sum(count for _, count in pairs),
        flops_per_row=pair_flops * sum(count / new for new, count in pairs),
        bytes_read=cold + call.num_bytes(q),
        bytes_cold=cold,
        bytes_written=call.written_bytes,
    )


def _kv_write(call: _Call) -> NodeCost:
    moved = call.num_bytes(call.value(0)) + call.num_bytes(call.value(1))
    return NodeCost(unit="vector", family="token_wise", dtype=_dtype(call), bytes_read=moved, bytes_written=moved)


def _qkv_rope_write(call: _Call) -> NodeCost:
    """Norm and rotation of q and k; q goes out, k and v go to the cache: as much is written as read."""
    qkv = call.value(0)
    read, cold = call.read_bytes(skip=(call.arg(5),))
    return NodeCost(
        unit="vector",
        family="token_wise",
        dtype=_dtype(call),
        flops=8.0 * math.prod(call.shape(qkv)),
        bytes_read=read,
        bytes_cold=cold,
        bytes_written=call.num_bytes(qkv),
    )


def _npu_scatter(call: _Call) -> NodeCost:
    """Rows written in place: the cache itself is not read."""
    moved = call.num_bytes(call.value(2))
    return NodeCost(unit="vector", family="token_wise", dtype=_dtype(call), bytes_read=moved, bytes_written=moved)


def _gather(call: _Call) -> NodeCost:
    """Rows picked from a table: as much is read as written, cold where the table is a weight."""
    written = call.written_bytes
    is_cold = any(call.is_cold(node) for node in call.node.all_input_nodes)
    return NodeCost(
        unit="copy",
        family="gather",
        dtype=_dtype(call),
        bytes_read=written,
        bytes_cold=written if is_cold else 0,
        bytes_written=written,
    )


def _moved(call: _Call, *, family: str) -> NodeCost:
    read, cold = call.read_bytes() if call.node.all_input_nodes else (0, 0)
    return NodeCost(unit="copy", family=family, bytes_read=read, bytes_cold=cold, bytes_written=call.written_bytes)


def _token_wise(call: _Call, flops_per_element: float = 1.0) -> NodeCost:
    """Any other operator: reads its arguments, writes its results, computes on the larger of them."""
    read, cold = call.read_bytes()
    inputs = [math.prod(call.shape(v)) for n in call.node.all_input_nodes for v in _tensors(n.meta.get("val"))]
    outputs = [math.prod(call.shape(v)) for v in _tensors(call.node.meta.get("val"))]
    return NodeCost(
        unit="vector",
        family="token_wise",
        dtype=_dtype(call) if inputs else "float32",
        flops=flops_per_element * max([*inputs, *outputs], default=0),
        bytes_read=read,
        bytes_cold=cold,
        bytes_written=call.written_bytes,
    )


def _summed_linear(call: _Call) -> NodeCost:
    """A product that sends its parts as they are ready: at best the longer of the two."""
    sent, messages = _all_reduce_sends(call.step.world_size, call.written_bytes)
    return replace(_linear(call), bytes_link=sent, messages=messages, sends_while_computing=True)


def _summed_and_normed(call: _Call) -> NodeCost:
    """A product, its sum, and a norm that is hidden behind them; the residual is read, sum and norm are written."""
    x, out = call.shape(call.value(0)), call.shape(call.value(2))
    product = _product(call, rows=math.prod(x[:-1]), inner=x[-1], columns=out[-1])
    sent, messages = _all_reduce_sends(call.step.world_size, call.num_bytes(call.value(2)))
    return replace(product, bytes_link=sent, messages=messages, sends_while_computing=True)


def _all_reduce_sends(world_size: int, size: float) -> tuple[float, int]:
    return 2 * (world_size - 1) / world_size * size, 2 * (world_size - 1)


def _collective(call: _Call, name: str) -> NodeCost:
    """Ring algorithms over the step's world; the local result is written once."""
    if name == "wait_tensor":
        return _FREE
    n = call.step.world_size
    size = call.num_bytes(call.arg(0).meta["val"] if isinstance(call.arg(0), fx.Node) else None)
    # Bytes each device sends, and in how many messages one after the other.
    sent, messages = {
        "all_reduce": _all_reduce_sends(n, size),
        "all_reduce_": _all_reduce_sends(n, size),
        "all_gather_into_tensor": ((n - 1) * size, n - 1),
        "reduce_scatter_tensor": ((n - 1) / n * size, n - 1),
        "all_to_all_single": ((n - 1) / n * size, n - 1),
        "broadcast": (size if n > 1 else 0, n - 1),
    }.get(name, (None, 0))
    if sent is None:
        raise UnknownCostError(f"no cost rule for the collective {name}; add one to node_cost._collective")
    return NodeCost(
        unit="communication", family="collective", dtype=_dtype(call), bytes_link=float(sent), messages=messages
    )


_RULES: dict[str, Callable[[_Call], NodeCost]] = {
    "aten::linear": _linear,
    "aten::mm": _matmul,
    "aten::bmm": _matmul,
    "aten::matmul": _matmul,
    "aten::addmm": _addmm,
    "xllm::packed_linear": _linear,
    "xllm::int8_linear": _linear,
    "xllm::int4_linear": _linear,
    "xllm::int8_zero_linear": _linear,
    "xllm::int4_zero_linear": _linear,
    "xllm::int8_dynamic_linear": _rounded_linear,
    "xllm::int4_dynamic_linear": _rounded_linear,
    "xllm::attention": _attention,
    "xllm::packed_embedding": _gather,
    "xllm::int8_embedding": _gather,
    "xllm::kv_write": _kv_write,
    "xllm::qkv_rope_write": _qkv_rope_write,
    # Square, mean, scale, weight.
    "xllm::rms_norm": lambda call: _token_wise(call, 4.0),
    "xllm::add_rms_norm": lambda call: _token_wise(call, 5.0),
    # A sigmoid and two products of each output, from two inputs.
    "xllm::silu_mul": lambda call: _token_wise(call, 3.0),
    "xllm::rope": lambda call: _token_wise(call, 3.0),
    "npu::npu_linear": _linear,
    "npu::npu_mm_all_reduce_base": _summed_linear,
    "xllm_npu::mm_all_reduce_add_rms_norm": _summed_and_normed,
    "npu::npu_rms_norm": lambda call: _token_wise(call, 4.0),
    "npu::npu_add_rms_norm": lambda call: _token_wise(call, 5.0),
    "npu::npu_swiglu": lambda call: _token_wise(call, 3.0),
    "npu::npu_rotary_mul": lambda call: _token_wise(call, 3.0),
    "npu::npu_scatter_nd_update_": _npu_scatter,
    "air::npu_fused_infer_attention_score": _npu_attention,
    # Marks for the compiler.
    "air::scope_enter": lambda _: _FREE,
    "air::scope_exit": lambda _: _FREE,
}
