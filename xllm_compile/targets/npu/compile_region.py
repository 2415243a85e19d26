"""From a region's program to a serialised GE graph, through TorchAir. Runs in a process that has torch_npu, on the null
device or a real one: nothing is executed, tensors are addresses."""

import io
import os
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from xllm_compile.graph_passes.region import placeholder_name
from xllm_compile.runtime.ops.collectives import ALL_REDUCE, WAIT
from xllm_compile.runtime.ops.npu import declare_operators
from xllm_compile.runtime.program import RegionProgram, concrete_shape
from xllm_compile.targets import UnsupportedOperatorError
from xllm_compile.targets.npu.ge_graph import GeOp, PlannedOp, check_graph

KV_CACHES = ("k_cache", "v_cache")

# The GE operator that each operator of the lowering pass becomes.
GE_TYPES = {
    "npu::npu_rms_norm": "RmsNorm",
    "npu::npu_add_rms_norm": "AddRmsNorm",
    "npu::npu_swiglu": "SwiGlu",
    "npu::npu_linear": "MatMul",
    "npu::npu_rotary_mul": "RotaryMul",
    "npu::npu_scatter_nd_update_": "ScatterNdUpdate",
    "npu::npu_mm_all_reduce_base": "MatmulAllReduce",
    "xllm_npu::mm_all_reduce_add_rms_norm": "MatmulAllReduceAddRmsNorm",
    "air::npu_fused_infer_attention_score": "FusedInferAttentionScore",
    "_c10d_functional::all_reduce": "HcomAllReduce",
}


def initialise() -> None:
    """Load torch_npu and set it up as graphs want it. Once per process, before the first program is loaded."""
    # torch_npu prints on import that there is no CANN.
    with redirect_stdout(io.StringIO()):
        import torch_npu
    import torchair
    import torchair.ops._npu_fused_infer_attention_score  # registers the form with lengths as tensors
    from torchair._ge_concrete_graph import compat_ir

    # Formats of the device's own and operators compiled one by one are of no use in a graph.
    torch_npu.npu.config.allow_internal_format = False
    torch_npu.npu.set_compile_mode(jit_compile=False)
    torch_npu.npu.set_device(0)
    torchair.logger.setLevel("ERROR")
    # TorchAir asks the installed CANN whether it knows each optional input. There is none to ask: a graph is for the
    # newest CANN that this torch_npu knows, and the one that loads it checks it again.
    compat_ir.is_cann_compat = lambda *_: ""
    _register_collectives()


def _register_collectives() -> None:
    """Converters of the functional collectives in place of TorchAir's, which ask HCCL for the name of the group that
    this process is in: a graph is for any rank, and names the group as the fused products do."""
    from torchair._ge_concrete_graph.fx2ge_converter import register_fx_node_ge_converter

    register_fx_node_ge_converter(ALL_REDUCE)(_convert_all_reduce)
    register_fx_node_ge_converter(WAIT)(_convert_wait)
    declare_operators()
    register_fx_node_ge_converter(torch.ops.xllm_npu.mm_all_reduce_add_rms_norm.default)(_convert_sum_and_norm)


def _convert_all_reduce(x: Any, kind: str, group: str, meta_outputs: Any = None) -> Any:
    from torchair._ge_concrete_graph import ge_apis

    return ge_apis.HcomAllReduce(x, reduction=kind, group=group, fusion=0)


def _convert_sum_and_norm(
    x1: Any, x2: Any, residual: Any, gamma: Any, hcom: str, epsilon: float = 1e-6, meta_outputs: Any = None
) -> Any:
    from torchair._ge_concrete_graph.compat_ir import ge_op
    from torchair.ge import attr

    return ge_op(
        op_type="MatmulAllReduceAddRmsNorm",
        inputs={"x1": x1, "x2": x2, "bias": None, "residual": residual, "gamma": gamma},
        outputs=["y", "norm_out"],
        attrs={"group": attr.Str(hcom), "is_trans_b": attr.Bool(True), "epsilon": attr.Float(epsilon)},
    )


def _convert_wait(x: Any, meta_outputs: Any = None) -> Any:
    """Nothing: GE makes the reader of another stream's value wait for it."""
    return x


def compile_program(program: RegionProgram, sizes: Mapping[str, int], output: Path) -> None:
    """Write the GE graph of one region for one bucket to ``output``, whole or not at all.

    ``sizes`` fixes every symbol of the program's inputs. Raises UnsupportedOperatorError when an operator of ours is
    left in it, GeGraphError when the graph is not what the passes planned, and what TorchAir raises.
    """
    specs = [(concrete_shape(spec, sizes), spec.dtype) for spec in program.inputs]
    specs += [(list(spec.shape), spec.dtype) for spec in program.weights]
    tensors = [torch.empty(shape, dtype=getattr(torch, dtype), device="npu") for shape, dtype in specs]
    names = [spec.name for spec in program.inputs] + [placeholder_name(spec.name) for spec in program.weights]
    with torch.no_grad():
        traced = make_fx(program.load(), tracing_mode="fake")(*tensors)
    _refuse_unsupported(traced.graph)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".torchair-") as scratch:
        _export(traced, tensors, Path(scratch))
        model = read_model(Path(scratch) / "graph.air")
        # TorchAir counts the graphs of its process.
        model.graph[0].name = program.name
        _name_inputs(model.graph[0], names)
        _fold_transposes(model.graph[0])
        caches = [name for name in KV_CACHES if name in names]
        plan, scopes = planned_ops(traced.graph), planned_scopes(traced.graph)
        check_graph(program.name, ge_ops(model.graph[0]), plan, caches, scopes)
        written = Path(scratch) / output.name
        written.write_bytes(model.SerializeToString(deterministic=True))
        os.replace(written, output)


def planned_ops(graph: fx.Graph) -> list[PlannedOp]:
    """The fused operators of a lowered graph, with the stream and the core limits of the scopes they are in."""
    planned = []
    scopes: list[dict[str, str]] = []
    for node in graph.nodes:
        if node.target is torch.ops.air.scope_enter.default:
            keys, values = node.args[:2]
            scopes.append(dict(zip(keys, values, strict=True)))
        elif node.target is torch.ops.air.scope_exit.default:
            scopes.pop()
        elif _operator_name(node) in GE_TYPES:
            attributes = {key: value for scope in scopes for key, value in scope.items()}
            planned.append(PlannedOp(type=GE_TYPES[_operator_name(node)], **_placement(attributes)))
    return planned


def planned_scopes(graph: fx.Graph) -> list[PlannedOp]:
    """Where operators of any type may be, with the types left out."""
    entered = (node.args for node in graph.nodes if node.target is torch.ops.air.scope_enter.default)
    return [PlannedOp(type="", **_placement(dict(zip(*args, strict=True)))) for args in entered]


def ge_ops(graph: Any) -> list[GeOp]:
    """The operators of a GraphDef as plain data, constants left out."""
    ops = []
    for op in graph.op:
        if op.type != "Const":
            attributes = {key: value.s.decode() for key, value in op.attr.items() if key in _PLACEMENT}
            ops.append(GeOp(name=op.name, type=op.type, inputs=tuple(op.input), **_placement(attributes)))
    return ops


_PLACEMENT = {"_user_stream_label": "stream", "_op_aicore_num": "cube_cores", "_op_vectorcore_num": "vector_cores"}


def _placement(attributes: Mapping[str, str]) -> dict[str, str]:
    return {field: attributes[key] for key, field in _PLACEMENT.items() if key in attributes}


def _operator_name(node: fx.Node) -> str:
    return node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""


def _refuse_unsupported(graph: fx.Graph) -> None:
    left = tuple(sorted({name for node in graph.nodes if (name := _operator_name(node)).startswith("xllm::")}))
    if left:
        raise UnsupportedOperatorError(left)


def _export(module: fx.GraphModule, tensors: list[torch.Tensor], folder: Path) -> None:
    """folder/graph.air, as torchair.dynamo_export writes it, of a graph that is traced already."""
    import torchair
    from torchair._ge_concrete_graph.fx2ge_converter import ExportSuccess

    config = torchair.CompilerConfig()
    config.mode = "max-autotune"
    config.export.export_mode = True
    config.export.export_path_dir = str(folder)
    config.export.export_name = "graph"
    config.export.weight_name = {}
    # An input that is written becomes one that GE writes back to.
    config.experimental_config.enable_ref_data = True
    # The attention's lengths are values of the device: its tiling must be computed there, not on the host.
    config.experimental_config.tiling_schedule_optimize = True
    try:
        with torch.no_grad():
            torchair.get_npu_backend(compiler_config=config)(module, tensors)(*tensors)
    except ExportSuccess:
        return
    raise RuntimeError("TorchAir returned from an export without exporting; it needs torch_npu 2.13")


def read_model(path: Path) -> Any:
    from torchair._ge_concrete_graph import ge_ir_pb2

    model = ge_ir_pb2.ModelDef()
    model.ParseFromString(path.read_bytes())
    return model


def _fold_transposes(graph: Any) -> None:
    """MatmulAllReduce reads a weight as it lies: TorchAir folds the transposition into a plain product only, and would
    have the device write a transposed copy of the weight in every step."""
    by_name = {op.name: op for op in graph.op}
    folded: list[Any] = []
    for op in graph.op:
        if op.type != "MatmulAllReduce" or op.attr["is_trans_b"].b:
            continue
        transpose = by_name[op.input[1].rpartition(":")[0]]
        if transpose.type == "Transpose":
            op.input[1] = transpose.input[0]
            op.attr["is_trans_b"].b = True
            folded.append(transpose)
    # A transposition goes when nothing reads it any more, then the constant with its axes.
    _remove_unread(graph, [op.name for op in folded])
    _remove_unread(graph, [op.input[1].rpartition(":")[0] for op in folded])


def _remove_unread(graph: Any, names: Iterable[str]) -> None:
    read = {source.rpartition(":")[0] for op in graph.op for source in op.input}
    unread = set(names) - read
    for op in [op for op in graph.op if op.name in unread]:
        graph.op.remove(op)


def _name_inputs(graph: Any, names: list[str]) -> None:
    """Give the graph's inputs the region's names. TorchAir's are positions, and addresses of this process where an
    input is written; inputs that nothing reads are not in the graph."""
    renamed = {}
    for op in graph.op:
        if op.type in ("Data", "RefData"):
            origin = op.attr["_origin_data_name"].s.decode() if op.type == "RefData" else op.name
            position = int(origin.removeprefix("arg").removesuffix("_1"))
            renamed[op.name] = names[position]
            if op.type == "RefData":
                del op.attr["_origin_data_name"]
    for op in graph.op:
        op.name = renamed.get(op.name, op.name)
        for index, source in enumerate(op.input):
            name, separator, output = source.rpartition(":")
            if name in renamed:
                op.input[index] = renamed[name] + separator + output
