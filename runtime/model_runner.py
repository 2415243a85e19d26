"""Executes token-packed steps on the compiled graphs of one artifact."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from xllm_compile.runtime.artifact import Manifest
from xllm_compile.runtime.compiled_graph import PackedStep, pack_step
from xllm_compile.runtime.compiled_steps import Chains, CompiledSteps
from xllm_compile.runtime.decode_loop import decode_by_steps
from xllm_compile.runtime.graph_cache import GraphCache, GraphChoice, build_cache
from xllm_compile.runtime.ops import native
from xllm_compile.runtime.ops.spec import SPLIT_SUFFIX
from xllm_compile.runtime.outputs import GraphCacheStats
from xllm_compile.runtime.program import RegionProgram
from xllm_compile.runtime.promotion import GraphPromoter, PromotionConfig
from xllm_compile.runtime.step import Int32Array, Step
from xllm_compile.runtime.warmup import warm_up


class CompiledModelRunner:
    """One model on one device. Not thread-safe: one step at a time.

    ``kv_layers`` are the KV cache's tensors, one per layer, written in place (shape in runtime/ops). The kernels
    must be loaded before.
    """

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        weights: dict[str, Tensor],
        kv_layers: Sequence[Tensor],
        *,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enforce_eager: bool = False,
        promotion: PromotionConfig | None = None,
    ) -> None:
        self.vocab_size = manifest.model.vocab_size
        self.max_model_len = max_model_len
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        programs = {program.name: program for program in manifest.programs}
        by_tokens = [program for program in manifest.programs if program.name not in ("head", "pool")]
        graphs, times = manifest.graphs, manifest.step_times
        self._token_graphs = build_cache(root, "T", times["T"], by_tokens, graphs, enforce_eager=enforce_eager)
        self._head_graphs = build_cache(root, "R", times["R"], [programs["head"]], graphs, enforce_eager=enforce_eager)
        # Ranks must pad alike: a graph that only one of them has would make their collectives differ in size.
        is_alone = manifest.tensor_parallel_size == 1
        can_promote = promotion is not None and self._token_graphs.never_compiled is None and is_alone
        self._promoter = GraphPromoter(root, manifest.build_key, promotion) if promotion and can_promote else None
        # Logits of more sequences than the plan counts with come on top.
        num_bytes = manifest.memory_plan.get("activation_bytes", 0) + 4 * max_num_seqs * self.vocab_size
        self.pool = native.ActivationPool(num_bytes) if native.is_loaded() else nullcontext()
        self._has_padded_seqs = any("S" in entry.sizes for entry in graphs)
        # Tensor-parallel regions may return a sum that is still on its way; the head would wait for it.
        self._waits_for_state = manifest.tensor_parallel_size > 1
        self._embed_weights = _region_weights(programs["embed"], weights)
        self._head_weights = _region_weights(programs["head"], weights)
        self.embedding_size = manifest.model.hidden_size
        self._pool_graphs = build_cache(root, "R", times["R"], [programs["pool"]], graphs, enforce_eager=enforce_eager)
        self._pool_weights = _region_weights(programs["pool"], weights)
        self._pooled = torch.empty(0, self.embedding_size)
        self._layers = _layer_plan(manifest.programs, weights, kv_layers)
        self._chains = Chains(self._layers)
        self._whole_steps = CompiledSteps(
            [("embed", self._embed_weights), *((region, [kv, *own]) for region, kv, own in self._layers)],
            self._head_weights,
        )
        # Buckets whose steps run in halves take the same weights through other graphs.
        self._split_graphs = build_cache(
            root, "T", times["T"], manifest.split_programs, graphs, enforce_eager=enforce_eager
        )
        self._split_buckets = frozenset(manifest.split_buckets)

    def execute(self, step: Step, on_layers: Callable[[], None] | None = None) -> Tensor:
        """See ModelRunner.execute. Raises RuntimeError when a kernel refuses its arguments."""
        if self._promoter is not None:
            self._promoter.between_steps(self._token_graphs)
        if len(self._pooled):
            # Let go before the step, so that the pool is empty.
            self._pooled = torch.empty(0, self.embedding_size)
        with self.pool:
            layers = self._token_graphs.choose(len(step.token_ids))
            wants_head = len(step.logits_at) > 0 and not self._is_split(layers)
            head = self._head_graphs.choose(len(step.logits_at)) if wants_head else None
            # Embeddings want more than logits; ranks wait for each other's sums between the graphs.
            if head is not None and not (len(step.pool_at) or self._waits_for_state):
                logits = self._run_whole(step, layers, head, on_layers)
                if logits is not None:
                    return logits
            state, split = self._run_layers(step, layers, on_layers)
            logits = self._run_head(step, state, split, head)
            if len(step.pool_at):
                self._pooled = self._run_pool(step, state)
            return logits

    def decode_greedily(self, step: Step, num_steps: int) -> Int32Array:
        """See DraftRunner.decode_greedily. Raises what `execute` raises."""
        num_seqs = len(step.slot)
        layers, head = self._token_graphs.choose(num_seqs), self._head_graphs.choose(num_seqs)
        whole = None
        if not self._waits_for_state:
            whole = self._whole_steps.of(self._token_graphs, layers, self._head_graphs, head)
        if whole is not None:
            # Step by step, the graph that failed is found and given up. Writing the same KV again is safe.
            with suppress(RuntimeError), self.pool:
                return whole.decode_greedily(self._packed(step, layers, head), num_seqs, num_steps)
        return decode_by_steps(self.execute, step, num_steps)

    def _run_whole(
        self, step: Step, layers: GraphChoice, head: GraphChoice, on_layers: Callable[[], None] | None
    ) -> Tensor | None:
        """Logits [R, V] by one call for all graphs; None where one is missing or failed."""
        whole = self._whole_steps.of(self._token_graphs, layers, self._head_graphs, head)
        if whole is None:
            return None
        packed = self._packed(step, layers, head)
        if on_layers is not None:
            on_layers()
        # Region by region, the graph that failed is found and given up. Writing the same KV again is safe.
        with suppress(RuntimeError):
            logits = whole(packed)
            return logits if len(logits) == len(step.logits_at) else logits[: len(step.logits_at)]
        return None

    def _packed(self, step: Step, layers: GraphChoice, head: GraphChoice) -> PackedStep:
        return pack_step(step, num_tokens=layers.size, num_seqs=self._num_seqs(step, layers), num_rows=head.size)

    def _is_split(self, choice: GraphChoice) -> bool:
        """Whether such a step runs in halves."""
        return choice.is_bucket and choice.size in self._split_buckets

    def _num_seqs(self, step: Step, choice: GraphChoice) -> int:
        # A bucket's graphs fix S to T: there are never more sequences than tokens.
        return choice.size if choice.is_bucket and self._has_padded_seqs else len(step.slot)

    def _run_layers(
        self, step: Step, choice: GraphChoice, on_layers: Callable[[], None] | None
    ) -> tuple[list[Tensor], GraphChoice | None]:
        """The state after the last layer: delta and residual, [T, E] each, padded; with a choice, in halves."""
        graphs = self._token_graphs
        suffix, is_split = "", self._is_split(choice)
        if is_split:
            graphs, suffix = self._split_graphs, SPLIT_SUFFIX
        num_seqs = self._num_seqs(step, choice)
        positions = _padded(step.positions, choice.size)
        tokens = [_padded(step.token_ids, choice.size), positions, _padded(step.rope_len, choice.size, 1)]
        *state, cos, sin = graphs.run("embed" + suffix, choice, [*tokens, *self._embed_weights])
        metadata = [
            cos,
            sin,
            positions,
            # Padding sequences are empty: they start where the last one ends.
            _padded(step.seq_start, num_seqs + 1, len(step.token_ids)),
            _padded(step.context_len, num_seqs),
            _padded(step.slot, num_seqs),
        ]
        if on_layers is not None:
            on_layers()
        return self._run_chain(graphs, suffix, choice, state, metadata), choice if is_split else None

    def _run_chain(
        self, graphs: GraphCache, suffix: str, choice: GraphChoice, state: list[Tensor], metadata: list[Tensor]
    ) -> list[Tensor]:
        """All layers in one call where all are compiled, else one by one."""
        chain = self._chains.of(graphs, suffix, choice)
        if chain is not None:
            try:
                return chain(state, metadata)
            except RuntimeError:
                if self._waits_for_state:
                    # Run again on this rank only, its collectives would meet the wrong ones of the others.
                    raise
                # One by one, the graph that failed is found and given up. Writing the same KV again is safe.
        for region, kv_cache, weights in self._layers:
            state = graphs.run(region + suffix, choice, [*state, *metadata, kv_cache, *weights])
        return state

    def _run_head(self, step: Step, state: list[Tensor], split: GraphChoice | None, head: GraphChoice | None) -> Tensor:
        if len(step.logits_at) == 0:
            # A chunk in the middle of a prompt: the head's weights, a good part of the model, need not be read.
            if self._waits_for_state:
                for tensor in state:
                    torch.ops._c10d_functional.wait_tensor(tensor)
            return torch.empty(0, self.vocab_size)
        if split is not None:
            rows = torch.from_numpy(step.logits_at)
            return self._split_graphs.run("head" + SPLIT_SUFFIX, split, [*state, rows, *self._head_weights])[0]
        assert head is not None
        rows = _padded(step.logits_at, head.size)
        (logits,) = self._head_graphs.run("head", head, [*state, rows, *self._head_weights])
        return logits[: len(step.logits_at)]

    def _run_pool(self, step: Step, state: list[Tensor]) -> Tensor:
        if self._waits_for_state:
            for tensor in state:
                torch.ops._c10d_functional.wait_tensor(tensor)
        if len(state) == 4:
            # In halves: those of delta, then those of residual.
            state = [torch.cat(state[:2]), torch.cat(state[2:])]
        choice = self._pool_graphs.choose(len(step.pool_at))
        rows = torch.from_numpy(step.pool_at)
        return self._pool_graphs.run("pool", choice, [*state, rows, *self._pool_weights])[0]

    def pooled(self) -> Tensor:
        """See ModelRunner.pooled."""
        return self._pooled

    def last_outcome(self) -> str:
        """See ModelRunner.last_outcome."""
        return self._token_graphs.last_outcome

    def graph_cache_stats(self) -> GraphCacheStats:
        """Steps by how their graphs were found, for the layers (with embed), the head and what pools embeddings."""
        # Copied first: the engine's thread goes on counting.
        caches = {"layers": self._token_graphs, "head": self._head_graphs, "pool": self._pool_graphs}
        parts = {part: dict(cache.counts) for part, cache in caches.items()}
        return GraphCacheStats(
            choices={
                (part, *found): count for part, counts in parts.items() for found, count in counts.items() if count
            },
            promotions=self._promoter.stats() if self._promoter else {},
            promoted_bytes=self._promoter.promoted_bytes if self._promoter else 0,
        )

    def warm_up(self) -> None:
        """Run every graph once, before the first step (see warmup). Ranks do it together. Raises RuntimeError where a
        graph with collectives fails."""
        layers = [(region, [kv_cache, *weights]) for region, kv_cache, weights in self._layers]
        head = ("head", self._head_weights)
        with self.pool:
            warm_up(self._token_graphs, [("embed", self._embed_weights), *layers])
            warm_up(self._head_graphs, [head])
            warm_up(self._pool_graphs, [("pool", self._pool_weights)])
            one_of_a_kind = [("embed", self._embed_weights), *dict(layers).items(), head]
            if self._split_graphs.programs:
                warm_up(self._split_graphs, [(region + SPLIT_SUFFIX, tensors) for region, tensors in one_of_a_kind])

    def run_operator_by_operator(self) -> None:
        """From now on no compiled graph runs; steps take the sizes and the halves they would have taken."""
        for cache in (self._token_graphs, self._head_graphs, self._pool_graphs, self._split_graphs):
            cache.graphs.clear()
            cache.generation += 1

    def close(self) -> None:
        """End what runs in the background."""
        if self._promoter is not None:
            self._promoter.close()


def _padded(values: Int32Array, size: int, fill: int = 0) -> Tensor:
    if len(values) == size:
        return torch.from_numpy(values)
    padded = np.full(size, fill, dtype=np.int32)
    padded[: len(values)] = values
    return torch.from_numpy(padded)


def _region_weights(program: RegionProgram, weights: dict[str, Tensor], layer: int = 0) -> list[Tensor]:
    return [weights[spec.name.format(layer=layer)] for spec in program.weights]


def _layer_plan(
    programs: Sequence[RegionProgram], weights: dict[str, Tensor], kv_layers: Sequence[Tensor]
) -> list[tuple[str, Tensor, list[Tensor]]]:
    """Of each layer in order, for each of its pieces: the region, the layer's KV cache and the piece's weights."""
    pieces: dict[int, list[RegionProgram]] = {}
    for program in programs:
        for layer in program.layers:
            pieces.setdefault(layer, []).append(program)
    return [
        (piece.name, kv_layers[layer], _region_weights(piece, weights, layer))
        for layer in sorted(pieces)
        for piece in pieces[layer]
    ]
