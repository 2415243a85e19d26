"""Who holds each physical page.

The states are xTensor's: **Free** pages belong to nobody; a page is **Allocated** once it is taken, **Mapped** while a
live sequence holds it, and **Reusable** afterwards: its content, or its place in a range, may serve the next sequence.
Reusable pages count as available. They are taken back the oldest first, those without indexed content before others.
Where several models share memory (``shared_pages.py``), each has a pool of its own that grows and shrinks.
"""

from collections import OrderedDict
from collections.abc import Iterable


class PagePoolEmptyError(RuntimeError):
    """Every page is held by a live sequence. The scheduler never lets this happen."""


class PagePool:
    """Counts only: it maps nothing and moves no data. Belongs to one thread."""

    def __init__(self, num_pages: int, *, is_empty: bool = False) -> None:
        """Of pages 0, ... num_pages - 1, all of them or, with is_empty, none until they are added."""
        self._num_owned = 0 if is_empty else num_pages
        # The lowest page first, and the last one that came back before all others: its memory is there and warm.
        self._free = [] if is_empty else list(range(num_pages - 1, -1, -1))
        self._live = [0] * num_pages
        self._is_indexed = bytearray(num_pages)
        self._reusable: OrderedDict[int, None] = OrderedDict()
        self._indexed: OrderedDict[int, None] = OrderedDict()
        self._num_live = 0

    @property
    def num_pages(self) -> int:
        """Pages that are the pool's."""
        return self._num_owned

    @property
    def num_available(self) -> int:
        """Pages that a live sequence could get: free ones and reusable ones."""
        return self._num_owned - self._num_live

    @property
    def num_cached(self) -> int:
        """Pages that no live sequence holds and whose content can be found."""
        return len(self._indexed)

    @property
    def num_live(self) -> int:
        return self._num_live

    @property
    def num_spare(self) -> int:
        """Pages whose taking costs nobody anything: free ones, and reusable ones without indexed content."""
        return len(self._free) + len(self._reusable)

    def num_by_state(self) -> dict[str, int]:
        """Pages that are free, allocated, mapped and reusable, in all num_pages."""
        free, reusable = len(self._free), len(self._reusable) + len(self._indexed)
        return {
            "free": free,
            "allocated": self._num_owned - free - reusable - self._num_live,
            "mapped": self._num_live,
            "reusable": reusable,
        }

    def num_holders(self, page: int) -> int:
        """Live sequences that hold the page."""
        return self._live[page]

    def is_indexed(self, page: int) -> bool:
        return bool(self._is_indexed[page])

    def take(self) -> int:
        """A page that no live sequence holds, now Allocated. Its holder takes it out of index and ranges first.

        Raises PagePoolEmptyError.
        """
        if self._free:
            return self._free.pop()
        for pages in (self._reusable, self._indexed):
            if pages:
                return pages.popitem(last=False)[0]
        raise PagePoolEmptyError(f"all {self._num_owned} pages are held by live sequences")

    def hold(self, page: int) -> None:
        """One more live sequence holds the page."""
        if self._live[page] == 0:
            self._num_live += 1
            self._reusable.pop(page, None)
            self._indexed.pop(page, None)
        self._live[page] += 1

    def let_go(self, page: int) -> None:
        """One live sequence less; after the last one the page is Reusable."""
        assert self._live[page] > 0
        self._live[page] -= 1
        if self._live[page] == 0:
            self._num_live -= 1
            self.keep(page)

    def keep(self, page: int) -> None:
        """An Allocated page becomes Reusable, the newest of its kind."""
        (self._indexed if self._is_indexed[page] else self._reusable)[page] = None

    def touch(self, page: int) -> None:
        """A page whose content is used again becomes the newest of its kind."""
        if page in self._indexed:
            self._indexed.move_to_end(page)

    def index(self, pages: Iterable[int]) -> None:
        """Their content can be found. They are live."""
        for page in pages:
            self._is_indexed[page] = 1

    def unindex(self, page: int) -> None:
        """Its content can no longer be found."""
        self._is_indexed[page] = 0
        if page in self._indexed:
            del self._indexed[page]
            self._reusable[page] = None

    def free(self, page: int) -> None:
        """A page that nothing holds, maps or finds any more."""
        assert self._live[page] == 0 and not self._is_indexed[page]
        self._reusable.pop(page, None)
        self._free.append(page)

    def add(self, pages: Iterable[int]) -> None:
        """They are the pool's from here on, and free."""
        before = len(self._free)
        self._free.extend(pages)
        self._num_owned += len(self._free) - before

    def remove(self) -> int:
        """A page as `take` gives it, which is the pool's no longer. Raises PagePoolEmptyError."""
        page = self.take()
        self._num_owned -= 1
        return page

    def next_free(self, count: int) -> list[int]:
        """The free pages that are taken next, the first one first."""
        return self._free[: -count - 1 : -1]

    def idle_pages(self) -> list[int]:
        """All pages without a live holder but the free ones."""
        return [*self._reusable, *self._indexed]

    def free_pages(self) -> list[int]:
        return list(self._free)
