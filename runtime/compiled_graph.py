"""Compiled graphs, one at a time or in a chain, called with Python's lock released.

torch's own runner holds the lock while a graph runs. Without it the host plans the next step while the device runs
this one; and a graph with collectives, waiting for the next one, would wait for ever for the thread that carries them
out and needs the lock to drop its tensors. ctypes releases it.
"""

import ctypes
import weakref
from _ctypes import dlclose
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from xllm_compile.runtime.ops import native


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
        self._num_outputs = count.value
        self.run = self._library.AOTInductorModelContainerRun

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        # The handles are the graph's from here on.
        inputs = _new_handles(tensors)
        outputs = (ctypes.c_void_p * self._num_outputs)()
        num_inputs, num_outputs = ctypes.c_size_t(len(tensors)), ctypes.c_size_t(self._num_outputs)
        self._check(self.run(self.container, inputs, num_inputs, outputs, num_outputs, None, None))
        return _take_tensors(outputs)

    def _check(self, status: int) -> None:
        if status != 0:
            message = ctypes.c_char_p()
            self._library.AOTInductorGetLastError(ctypes.byref(message))
            raise RuntimeError((message.value or b"the graph failed").decode(errors="replace"))


class GraphChain:
    """Graphs that hand a state on, with the tensors that each always gets: one call runs them all.

    graph i gets [*state, *metadata, *own[i]] and returns the next state, of as many tensors. The chain keeps graphs
    and tensors alive.
    """

    def __init__(self, graphs: Sequence[CompiledGraph], own: Sequence[Sequence[Tensor]]) -> None:
        count = len(graphs)
        flat = [tensor for tensors in own for tensor in tensors]
        self._graphs = tuple(graphs)
        self._count = ctypes.c_int64(count)
        self._runs = (ctypes.c_void_p * count)(*(ctypes.cast(graph.run, ctypes.c_void_p).value for graph in graphs))
        self._containers = (ctypes.c_void_p * count)(*(graph.container.value for graph in graphs))
        self._own = _new_handles(flat)
        starts = [0]
        for tensors in own:
            starts.append(starts[-1] + len(tensors))
        self._own_at = (ctypes.c_int64 * (count + 1))(*starts)
        self._run = native.graph_chain()
        weakref.finalize(self, _delete_handles, self._own).atexit = False

    def __call__(self, state: Sequence[Tensor], metadata: Sequence[Tensor]) -> list[Tensor]:
        """The state after the last graph. Raises RuntimeError when one fails; state is as it was."""
        given, shared = _new_handles(state), _new_handles(metadata)
        results = (ctypes.c_void_p * len(state))()
        try:
            num_run = self._run(
                self._count,
                self._runs,
                self._containers,
                self._own,
                self._own_at,
                ctypes.c_int64(len(state)),
                given,
                ctypes.c_int64(len(metadata)),
                shared,
                results,
            )
        finally:
            _delete_handles(given)
            _delete_handles(shared)
        if num_run != self._count.value:
            raise RuntimeError(f"graph {num_run} of {self._count.value} failed")
        return _take_tensors(results)


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
