"""The unit the passes work on: one region's FX graph, its inputs, and how each weight is made from the checkpoint."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

import xllm_compile.runtime.ops  # noqa: F401  (registers torch.ops.xllm)
from xllm_compile.runtime.ops.spec import TensorSpec, WeightSpec


@dataclass(kw_only=True, slots=True)
class RegionGraph:
    """Passes edit ``module`` and ``weights`` in place. Placeholders are the inputs, in order, then the weights."""

    name: str
    module: fx.GraphModule
    inputs: tuple[TensorSpec, ...]
    weights: dict[str, WeightSpec]
    """Placeholder name -> how the weight is made; in placeholder order."""

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def placeholder(self, name: str) -> fx.Node:
        node: fx.Node
        for node in self.graph.find_nodes(op="placeholder"):
            if node.name == name:
                return node
        raise KeyError(f"region {self.name} has no placeholder {name}")

    def weight_of(self, node: Any) -> WeightSpec | None:
        """The weight spec of a placeholder node; None for anything else."""
        return self.weights.get(node.name) if isinstance(node, fx.Node) and node.op == "placeholder" else None

    def replace_weights(self, old: Sequence[fx.Node], spec: WeightSpec, value: torch.Tensor) -> fx.Node:
        """A new placeholder for ``spec`` in place of the first of ``old``; the old ones go once nothing uses them."""
        with self.graph.inserting_before(old[0]):
            node = self.graph.placeholder(placeholder_name(spec.name))
        node.meta["val"] = value
        self.weights[node.name] = spec
        return node

    def finish(self) -> None:
        """After edits: drop dead nodes and unused weights, check the graph, regenerate the code."""
        self.graph.eliminate_dead_code()
        for node in self.graph.find_nodes(op="placeholder"):
            if node.name in self.weights and not node.users:
                del self.weights[node.name]
                self.graph.erase_node(node)
        order = [node.name for node in self.graph.find_nodes(op="placeholder")]
        self.weights = {name: self.weights[name] for name in order if name in self.weights}
        self.graph.lint()
        self.module.recompile()

    def copy(self, name: str) -> "RegionGraph":
        """The same region under another name, to be changed by itself."""
        graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(self.graph, copied)
        graph.output(output)
        graph.output_node().meta = dict(self.graph.output_node().meta)
        module = fx.GraphModule(self.module, graph)
        return RegionGraph(name=name, module=module, inputs=self.inputs, weights=dict(self.weights))

    def op_counts(self) -> dict[str, int]:
        """How many of each operator the graph calls; for reports and golden dumps."""
        counts = Counter(str(node.target) for node in self.graph.nodes if node.op == "call_function")
        return dict(sorted((name, n) for name, n in counts.items() if name != "<built-in function getitem>"))


@dataclass(kw_only=True, slots=True)
class PassReport:
    """What one pass did to one region. ``skips`` counts near-misses by reason."""

    name: str
    region: str
    matches: int = 0
    skips: dict[str, int] = field(default_factory=dict)
    ops_before: dict[str, int] = field(default_factory=dict)
    """Operators the graph called before the pass, and after; filled in by the runner, as are the next two."""
    ops_after: dict[str, int] = field(default_factory=dict)
    program: str = ""
    """The graph as text after the pass, where the pass changed it; for the report page only."""
    seconds: float = 0.0

    def skip(self, reason: str) -> None:
        self.skips[reason] = self.skips.get(reason, 0) + 1


def placeholder_name(weight_name: str) -> str:
    """A Python identifier for a weight's placeholder: 'layers.{layer}.mlp.up_proj.weight' -> 'w_mlp_up_proj_weight'."""
    local = weight_name.removeprefix("model.").removeprefix("layers.{layer}.")
    return "w_" + "".join(c if c.isalnum() else "_" for c in local)


def insert_call(graph: fx.Graph, before: fx.Node, target: Any, *args: Any) -> fx.Node:
    """Insert a call with its ``meta["val"]`` computed from the arguments' own."""
    with graph.inserting_before(before):
        node = graph.call_function(target, args)
    values = fx.map_arg(args, lambda n: n.meta["val"])
    fake_mode = next(v for v in (n.meta["val"] for n in node.all_input_nodes) if hasattr(v, "fake_mode")).fake_mode
    with fake_mode:
        node.meta["val"] = target(*values)
    return node


def args_of(node: fx.Node) -> tuple[Any, ...]:
    """The positional arguments, untyped: fx types them as anything a graph may hold."""
    return node.args
