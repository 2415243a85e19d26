"""What a device must be able to do for xTensor: physical pages that are mapped at addresses of our choosing."""

from typing import Protocol

from torch import Tensor


class OutOfMappingsError(RuntimeError):
    """The system refuses one more mapping, or has no memory to back it; the message names the limit to raise."""


class VirtualMemory(Protocol):
    """A pool of physical pages, numbered from 0, and address space to map them in.

    Addresses are bytes, multiples of page_bytes. A page may be mapped at many addresses. Calls may come from any
    thread; two calls at a time never concern the same address.
    """

    page_bytes: int
    num_pages: int
    max_mappings: int
    """Most mapped pages at the same time, one page at two addresses counted twice."""

    def reserve(self, num_bytes: int) -> int:
        """The address of num_bytes that nothing is mapped in. Raises ValueError when the system has not as many."""
        ...

    def map(self, address: int, page: int) -> None:
        """Show the page at the address, in place of what was mapped there. Raises OutOfMappingsError."""
        ...

    def prepare(self, page: int) -> None:
        """Have the page's physical memory there, so that mapping it takes no longer than a mapping does.

        Other calls may concern the page at the same time.
        """
        ...

    def unmap(self, address: int, num_bytes: int) -> None:
        """Show nothing from the address on. Touching it is a fault until something is mapped again."""
        ...

    def copy(self, page: int, address: int, num_bytes: int) -> None:
        """Copy the first bytes of the page to the address, where another page is mapped."""
        ...

    def read(self, page: int, offset: int, num_bytes: int) -> bytes:
        """Part of a page, on the host. Nobody may be writing it."""
        ...

    def discard(self, page: int) -> None:
        """Give the page's physical memory back. It comes again, with any content, when the page is next mapped."""
        ...

    def tensor(self, address: int, num_bytes: int) -> Tensor:
        """Reserved addresses as uint8 [num_bytes]; the reservation lives as long as any view of it."""
        ...
