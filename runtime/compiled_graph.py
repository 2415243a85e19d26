"""Compiled graphs, one at a time, in a chain or as whole steps, called with Python's lock released.

torch's own runner holds the lock while a graph runs. Without it the host plans the next step while the device runs
this one; and a graph with collectives, waiting for the next one, would wait for ever for the thread that carries them
out and needs the lock to drop its tensors. ctypes releases it.
"""

import ctypes
import weakref
from _ctypes import dlclose
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from xllm_compile.runtime.ops import native
from xllm_compile.runtime.step import Int32Array, Step

# As graph_chain.cpp has it: a line of the caches.
_ALIGNED_INTS = 16


class CompiledGraph:
    """A library written by AOTInductor, through the C interface that it exports. Raises RuntimeError."""

    def __init__(self, path: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as err:
            raise RuntimeError(str(err)) from err
        self.container = ctypes.c_void_p()
        create = self._library.AOTInductorModelContainerCreateWithDevice
        self._check(create(ctypes.byref(self.container), ctypes.c_size_t(1), b"cpu", None))
        weakref.finalize(self, _unload, self._library, self.container).atexit = False
        count = ctypes.c_size_t()
        self._check(self._library.AOTInductorModelContainerGetNumOutputs(self.container, ctypes.byref(count)))
        self.num_outputs = count.value
        self.run = self._library.AOTInductorModelContainerRun

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        # The handles are the graph's from here on.
        inputs = _new_handles(tensors)
        outputs = (ctypes.c_void_p * self.num_outputs)()
        num_inputs, num_outputs = ctypes.c_size_t(len(tensors)), ctypes.c_size_t(self.num_outputs)
        self._check(self.run(self.container, inputs, num_inputs, outputs, num_outputs, None, None))
        return _take_tensors(outputs)

    def _check(self, status: int) -> None:
        if status != 0:
            message = ctypes.c_char_p()
            self._library.AOTInductorGetLastError(ctypes.byref(message))
            raise RuntimeError((message.value or b"the graph failed").decode(errors="replace"))


class _Graphs:
    """Graphs with the tensors that each always gets, as the native calls take them. Keeps both alive."""

    def __init__(self, graphs: Sequence[CompiledGraph], own: Sequence[Sequence[Tensor]]) -> None:
        count = len(graphs)
        self._graphs = tuple(graphs)
        runs = (ctypes.c_void_p * count)(*(ctypes.cast(graph.run, ctypes.c_void_p).value for graph in graphs))
        containers = (ctypes.c_void_p * count)(*(graph.container.value for graph in graphs))
        handles = _new_handles([tensor for tensors in own for tensor in tensors])
        starts = [0]
        for tensors in own:
            starts.append(starts[-1] + len(tensors))
        self.arguments = ctypes.c_int64(count), runs, containers, handles, (ctypes.c_int64 * (count + 1))(*starts)
        weakref.finalize(self, _delete_handles, handles).atexit = False


class GraphChain:
    """Graphs that hand a state on, with the tensors that each always gets: one call runs them all.

    graph i gets [*state, *metadata, *own[i]] and returns the next state, of as many tensors. The chain keeps graphs
    and tensors alive.
    """

    def __init__(self, graphs: Sequence[CompiledGraph], own: Sequence[Sequence[Tensor]]) -> None:
        self._count = len(graphs)
        self._graphs = _Graphs(graphs, own)
        self._run = native.graph_chain()

    def __call__(self, state: Sequence[Tensor], metadata: Sequence[Tensor]) -> list[Tensor]:
        """The state after the last graph. Raises RuntimeError when one fails; state is as it was."""
        given, shared = _new_handles(state), _new_handles(metadata)
        results = (ctypes.c_void_p * len(state))()
        try:
            num_run = self._run(
                *self._graphs.arguments,
                ctypes.c_int64(len(state)),
                given,
                ctypes.c_int64(len(metadata)),
                shared,
                results,
            )
        finally:
            _delete_handles(given)
            _delete_handles(shared)
        if num_run != self._count:
            raise RuntimeError(f"graph {num_run} of {self._count} failed")
        return _take_tensors(results)


@dataclass(frozen=True, slots=True)
class PackedStep:
    """The arrays of a `Step` in one, as the native calls take them, padded to the sizes that the graphs want."""

    values: Int32Array
    num_tokens: int
    num_seqs: int
    num_rows: int

    @property
    def arguments(self) -> tuple[ctypes.c_void_p | ctypes.c_int64, ...]:
        sizes = self.num_tokens, self.num_seqs, self.num_rows
        return ctypes.c_void_p(self.values.ctypes.data), *map(ctypes.c_int64, sizes)


def pack_step(step: Step, *, num_tokens: int, num_seqs: int, num_rows: int) -> PackedStep:
    """A copy of the step."""
    parts = (
        (step.token_ids, num_tokens, 0),
        (step.positions, num_tokens, 0),
        (step.rope_len, num_tokens, 1),
        # Padding sequences are empty: they start where the last one ends.
        (step.seq_start, num_seqs + 1, len(step.token_ids)),
        (step.context_len, num_seqs, 0),
        (step.slot, num_seqs, 0),
        (step.logits_at, num_rows, 0),
    )
    values = np.zeros(sum(_aligned(size) for _, size, _ in parts), dtype=np.int32)
    at = 0
    for part, size, fill in parts:
        end = at + len(part)
        values[at:end] = part
        if fill:
            values[end : at + size] = fill
        at += _aligned(size)
    return PackedStep(values, num_tokens, num_seqs, num_rows)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED_INTS) * _ALIGNED_INTS


class CompiledStep:
    """All graphs of a step in one native call, or of decode steps, each on the most probable tokens of the one before.

    RuntimeError means that a graph failed; running a step again is safe.
    """

    def __init__(self, graphs: Sequence[CompiledGraph], own: Sequence[Sequence[Tensor]]) -> None:
        """graphs: embed, the layers' and the head's, with the tensors that each always gets."""
        self._graphs = _Graphs(graphs, own)
        # The embedding's other two outputs are cosine and sine.
        self._num_state = ctypes.c_int64(graphs[0].num_outputs - 2)
        self._run = native.run_step()
        self._decode = native.decode_greedily()

    def __call__(self, step: PackedStep) -> Tensor:
        """The logits [num_rows, V]."""
        logits = (ctypes.c_void_p * 1)()
        if self._run(*self._graphs.arguments, self._num_state, *step.arguments, logits) != 0:
            raise RuntimeError(native.last_error())
        return _take_tensors(logits)[0]

    def decode_greedily(self, step: PackedStep, num_seqs: int, num_steps: int) -> Int32Array:
        """The tokens [num_steps, num_seqs]. The step, which has one token of each sequence, is where the last step left
        it afterwards."""
        chosen = np.empty((num_steps, num_seqs), dtype=np.int32)
        num_run = self._decode(
            *self._graphs.arguments,
            self._num_state,
            *step.arguments,
            ctypes.c_int64(num_seqs),
            ctypes.c_int64(num_steps),
            ctypes.c_void_p(chosen.ctypes.data),
        )
        if num_run != num_steps:
            raise RuntimeError(f"decode step {num_run} of {num_steps} failed")
        return chosen


def _new_handles(tensors: Sequence[Tensor]) -> "ctypes.Array[ctypes.c_void_p]":
    """New references to the tensors, whoever gets the array deletes them."""
    capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(list(tensors))
    return (ctypes.c_void_p * len(tensors))(*(native.get_pointer(capsule, None) for capsule in capsules))


def _take_tensors(handles: "ctypes.Array[ctypes.c_void_p]") -> list[Tensor]:
    capsules = [native.new_capsule(handle, None, None) for handle in handles]
    tensors: list[Tensor] = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(capsules)
    return tensors


def _delete_handles(handles: "ctypes.Array[ctypes.c_void_p]") -> None:
    for handle in handles:
        assert handle is not None
        native.delete_handle(handle)


def _unload(library: ctypes.CDLL, container: ctypes.c_void_p) -> None:
    library.AOTInductorModelContainerDelete(container)
    dlclose(library._handle)
