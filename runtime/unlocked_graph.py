"""A compiled graph called with Python's lock released: what a graph with collectives needs.

The thread that carries out a collective drops its tensors when it is done, and takes Python's lock to do so for those
that Python knows. torch's own runner holds the lock while a graph runs: a graph that waits for the next collective
would wait for ever. ctypes releases it.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

_CAPSULE = ctypes.pythonapi
_CAPSULE.PyCapsule_GetPointer.restype = ctypes.c_void_p
_CAPSULE.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_CAPSULE.PyCapsule_New.restype = ctypes.py_object
_CAPSULE.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class UnlockedGraph:
    """A library written by AOTInductor, through the C interface that it exports. Raises RuntimeError."""

    def __init__(self, path: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as err:
            raise RuntimeError(str(err)) from err
        self._container = ctypes.c_void_p()
        create = self._library.AOTInductorModelContainerCreateWithDevice
        self._check(create(ctypes.byref(self._container), ctypes.c_size_t(1), b"cpu", None))
        count = ctypes.c_size_t()
        self._check(self._library.AOTInductorModelContainerGetNumOutputs(self._container, ctypes.byref(count)))
        self._num_outputs = count.value
        self._run = self._library.AOTInductorModelContainerRun

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(tensors)
        inputs = (ctypes.c_void_p * len(tensors))(
            *(_CAPSULE.PyCapsule_GetPointer(capsule, None) for capsule in capsules)
        )
        outputs = (ctypes.c_void_p * self._num_outputs)()
        # The handles in `inputs` are the callee's from here on.
        self._check(
            self._run(
                self._container,
                inputs,
                ctypes.c_size_t(len(tensors)),
                outputs,
                ctypes.c_size_t(self._num_outputs),
                None,
                None,
            )
        )
        handles = [_CAPSULE.PyCapsule_New(handle, None, None) for handle in outputs]
        results: list[Tensor] = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(handles)
        return results

    def _check(self, status: int) -> None:
        if status != 0:
            get_error = self._library.AOTInductorGetLastError
            message = ctypes.c_char_p()
            get_error(ctypes.byref(message))
            raise RuntimeError((message.value or b"the graph failed").decode(errors="replace"))
