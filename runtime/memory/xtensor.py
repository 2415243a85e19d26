"""xTensor: one contiguous range of addresses for each sequence, whose pages are mapped as its tokens arrive.

Kernels see plain strided tensors, one per layer, and no block table. The layout is token-major: element
[slot, token, layer, K/V, kv_head, head_dim], so a sequence has one range for all layers and each layer's tensor has a
constant stride from token to token. A page is a piece of the range, whatever tokens it falls on.
Source: xTensor of arXiv:2510.14686, section 4.3.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from xllm_compile.runtime.memory.virtual_memory import VirtualMemory


class XTensor:
    """The ranges of num_slots sequences and the page at each of their positions. Belongs to one thread.

    Nothing here decides: ``runtime/kv_cache.py`` says which page goes where.
    """

    def __init__(self, memory: VirtualMemory, num_slots: int, slot_bytes: int) -> None:
        """slot_bytes is what a range must hold; it is rounded up to whole pages. Raises ValueError, see reserve."""
        self.memory = memory
        self.pages_per_slot = -(-slot_bytes // memory.page_bytes)
        self.slot_bytes = self.pages_per_slot * memory.page_bytes
        self._address = memory.reserve(num_slots * self.slot_bytes)
        self.ranges: Tensor = memory.tensor(self._address, num_slots * self.slot_bytes).view(num_slots, -1)
        """uint8 [num_slots, slot_bytes]; only mapped pages may be touched."""
        self._tables: list[list[int | None]] = [[None] * self.pages_per_slot for _ in range(num_slots)]
        self._places: dict[int, set[tuple[int, int]]] = {}
        """Where each page is mapped: (slot, position)."""
        self._num_mapped = [0] * num_slots
        self._premapper = ThreadPoolExecutor(1, thread_name_prefix="xllm-premap")
        self._preparer = ThreadPoolExecutor(1, thread_name_prefix="xllm-prepare")
        self._under_way: dict[tuple[int, int], Future[None]] = {}

    @property
    def num_mappings(self) -> int:
        return sum(self._num_mapped)

    def num_mapped(self, slot: int) -> int:
        """Pages mapped in the slot's range."""
        return self._num_mapped[slot]

    def page(self, slot: int, position: int) -> int | None:
        """The page mapped at the position of the slot's range, counted in pages."""
        return self._tables[slot][position]

    def mapped(self, slot: int) -> Iterator[tuple[int, int]]:
        """(position, page) of what is mapped in the slot's range, in order."""
        left = self._num_mapped[slot]
        for position, page in enumerate(self._tables[slot]):
            if left == 0:
                return
            if page is not None:
                left -= 1
                yield position, page

    def places(self, page: int) -> list[tuple[int, int]]:
        """(slot, position) of each place where the page is mapped."""
        return sorted(self._places.get(page, ()))

    def map(self, slot: int, position: int, page: int, *, is_ahead: bool = False) -> None:
        """Map the page there, in place of what was; ``is_ahead`` has another thread do it: `settle` waits for that.

        Raises OutOfMappingsError.
        """
        self._forget(slot, position)
        self._tables[slot][position] = page
        self._places.setdefault(page, set()).add((slot, position))
        self._num_mapped[slot] += 1
        if is_ahead:
            # A method of this object: the addresses stay reserved for as long as somebody may map there.
            self._under_way[slot, position] = self._premapper.submit(self._map_now, slot, position, page)
        else:
            self._map_now(slot, position, page)

    def prepare(self, page: int) -> None:
        """Have another thread bring the page's memory; nobody waits for it."""
        # Not the thread that maps ahead: a step may wait for that one.
        self._preparer.submit(self.memory.prepare, page)

    def finish_preparing(self) -> None:
        """Wait until the memory of all pages that were prepared is there."""
        self._preparer.submit(lambda: None).result()

    def settle(self, slot: int, position: int) -> None:
        """Wait until what was mapped ahead is mapped. Raises OutOfMappingsError."""
        future = self._under_way.pop((slot, position), None)
        if future is not None:
            future.result()

    def unmap(self, slot: int, begin: int, end: int) -> None:
        """Unmap the positions begin, ... end - 1."""
        for position in range(begin, end):
            self._forget(slot, position)
        self.memory.unmap(self.address(slot, begin), (end - begin) * self.memory.page_bytes)

    def address(self, slot: int, position: int) -> int:
        return self._address + slot * self.slot_bytes + position * self.memory.page_bytes

    def close(self) -> None:
        """End the threads that map and prepare ahead."""
        self._premapper.shutdown()
        self._preparer.shutdown(cancel_futures=True)

    def _map_now(self, slot: int, position: int, page: int) -> None:
        self.memory.map(self.address(slot, position), page)

    def _forget(self, slot: int, position: int) -> None:
        self.settle(slot, position)
        page = self._tables[slot][position]
        if page is None:
            return
        self._tables[slot][position] = None
        self._num_mapped[slot] -= 1
        places = self._places[page]
        places.remove((slot, position))
        if not places:
            del self._places[page]
