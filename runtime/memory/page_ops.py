"""What happened to the pages of an instance's slots, as numbers that ride with a step.

The host maps and unmaps at once, for slots at rest. Copies read what an earlier step writes, so the device makes them
in its turn. The other ranks of a tensor-parallel instance do all of it in the order of the steps.
"""

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from xllm_compile.runtime.memory.xtensor import XTensor

_MAP, _UNMAP, _COPY = range(3)
_WIDTH = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Restore:
    """A block that comes back from a tier. Only where there are no other ranks: the numbers do not carry it."""

    slot: int
    offset: int
    data: bytes


class PageOps:
    """Operations since they were last taken, in order."""

    def __init__(self) -> None:
        self._values: list[int] = []
        self._restores: list[Restore] = []

    def map(self, slot: int, position: int, page: int) -> None:
        self._values += (_MAP, slot, position, page, 0)

    def unmap(self, slot: int, begin: int, end: int) -> None:
        self._values += (_UNMAP, slot, begin, end, 0)

    def copy(self, page: int, slot: int, position: int, num_bytes: int) -> None:
        """The first num_bytes of the page go to the one mapped at the slot's position."""
        self._values += (_COPY, slot, position, page, num_bytes)

    def restore(self, slot: int, offset: int, data: bytes) -> None:
        """The data go to the slot's range, offset bytes from its start."""
        self._restores.append(Restore(slot=slot, offset=offset, data=data))

    def take_restores(self) -> list["Restore"]:
        restores, self._restores = self._restores, []
        return restores

    def take(self) -> npt.NDArray[np.int32]:
        """[5 * operations], as `run_copies` and `replay` read it."""
        values, self._values = self._values, []
        return np.array(values, dtype=np.int32)


def run_copies(ops: npt.NDArray[np.int32], xtensor: XTensor) -> None:
    """On the rank that mapped already: make the copies."""
    for kind, slot, position, page, num_bytes in ops.reshape(-1, _WIDTH).tolist():
        if kind == _COPY:
            xtensor.memory.copy(page, xtensor.address(slot, position), num_bytes)


def run_restores(restores: Iterable[Restore], xtensor: XTensor) -> None:
    for each in restores:
        ctypes.memmove(xtensor.address(each.slot, 0) + each.offset, each.data, len(each.data))


def replay(ops: npt.NDArray[np.int32], xtensor: XTensor) -> None:
    """On another rank: do everything."""
    for kind, slot, position, page, num_bytes in ops.reshape(-1, _WIDTH).tolist():
        if kind == _MAP:
            xtensor.map(slot, position, page)
        elif kind == _UNMAP:
            xtensor.unmap(slot, position, page)
        else:
            xtensor.memory.copy(page, xtensor.address(slot, position), num_bytes)
