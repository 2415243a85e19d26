"""The physical pages of one process, shared by its models: for the KV of each, and for the weights of those awake.

A model has a `PageShare`. What it has of pages for KV grows and shrinks with its use: its engine asks before it plans a
step (`request`), and gives pages up when another model lacks some (`num_asked`, `give`), in its own thread, when no
step of it is under way. An awake model keeps the pages of one full sequence, so it always moves on.

Pages of weights are a charge: on the CPU weights are mapped from the artifact's file, and the system's page cache is
the memory that the charged pages do without.
"""

import threading
from collections.abc import Callable, Iterable
from dataclasses import replace

from xllm_compile.runtime.memory.virtual_memory import VirtualMemory
from xllm_compile.runtime.policies.page_shares import PageUse, num_granted, num_surplus

# Others answer between two steps; the longest ones are prefills of a large model.
ANSWER_TIMEOUT_S = 30.0


class SharedMemoryFullError(RuntimeError):
    """A model does not fit beside those that are awake. Nothing has changed; the message says what would help."""


class SharedPages:
    """Thread-safe."""

    def __init__(self, memory: VirtualMemory) -> None:
        """``memory`` is all there is, of one page size."""
        self.memory = memory
        self.shares: list[PageShare] = []
        self._free = list(range(memory.num_pages - 1, -1, -1))
        """KV takes pages from the end, those that were used last; weights from the beginning, where memory may be
        missing."""
        self._changed = threading.Condition()
        self._waking = threading.Lock()
        self._is_waking = False
        """Somebody collects the pages of a model: nobody else gets any."""

    @property
    def num_free(self) -> int:
        return len(self._free)

    def share(self, name: str, *, num_weight_pages: int, min_kv_pages: int) -> "PageShare":
        """For a model that fits alone; it is asleep until its `wake`."""
        assert num_weight_pages + min_kv_pages <= self.memory.num_pages
        share = PageShare(self, name, num_weight_pages=num_weight_pages, min_kv_pages=min_kv_pages)
        self.shares.append(share)
        return share

    def fair_share(self) -> int:
        """KV pages for each awake model, if all had the same."""
        awake = [share for share in self.shares if share.is_awake]
        num_weight_pages = sum(share.num_weight_pages for share in awake)
        return (self.memory.num_pages - num_weight_pages) // max(len(awake), 1)


class PageShare:
    """One model's part of the shared pages."""

    def __init__(self, pages: SharedPages, name: str, *, num_weight_pages: int, min_kv_pages: int) -> None:
        self.name = name
        self.num_weight_pages = num_weight_pages
        self.is_awake = False
        self.num_asked = 0
        """Pages that this model is asked to give up; 0 once it has answered."""
        self.on_asked: Callable[[], None] = lambda: None
        """Called, from any thread, when num_asked has become positive; must not wait."""
        self.memory = pages.memory
        self._pages = pages
        self._weight_pages: list[int] = []
        self._use = PageUse(min_pages=min_kv_pages)

    @property
    def use(self) -> PageUse:
        return self._use

    def request(self, use: PageUse) -> list[int]:
        """Note how many pages the model uses, and give it the free ones it may have. Others are asked for the rest."""
        pages = self._pages
        with pages._changed:
            self._use = use = replace(use, min_pages=self._use.min_pages)
            if pages._is_waking or not self.is_awake:
                return []
            others = [share for share in pages.shares if share.is_awake and share is not self]
            fair_share = pages.fair_share()
            taken = self._take_free(
                num_granted(
                    use,
                    num_free=len(pages._free),
                    fair_share=fair_share,
                    is_contested=any(other._use.num_lacking for other in others),
                )
            )
            self._use = replace(use, num_owned=use.num_owned + len(taken))
            self._ask(others, self._use.num_lacking, fair_share)
            return taken

    def surplus(self, use: PageUse) -> int:
        """Pages of those asked for that the model can give up."""
        use = replace(use, min_pages=self._use.min_pages)
        fair_share = 0 if self._pages._is_waking else self._pages.fair_share()
        return min(self.num_asked, num_surplus(use, fair_share=fair_share))

    def give(self, given: Iterable[int], use: PageUse) -> None:
        """Answer: these pages are the model's no longer, and what is left is used so."""
        with self._pages._changed:
            self._pages._free += given
            self._use = replace(use, min_pages=self._use.min_pages)
            self.num_asked = 0
            self._pages._changed.notify_all()

    def wake(self) -> list[int]:
        """Take the pages of the weights, and return as many as one full sequence needs.

        Waits until others have given up what they do not use. Raises SharedMemoryFullError, and changes nothing.
        """
        pages, needed = self._pages, self.num_weight_pages + self._use.min_pages
        with pages._waking, pages._changed:
            if self.is_awake:
                return []
            others = [share for share in pages.shares if share.is_awake]
            pages._is_waking = True
            try:
                self._ask(others, needed - len(pages._free), 0)
                pages._changed.wait_for(
                    lambda: len(pages._free) >= needed or not any(other.num_asked for other in others),
                    ANSWER_TIMEOUT_S,
                )
            finally:
                pages._is_waking = False
            if len(pages._free) < needed:
                raise SharedMemoryFullError(self._refusal(needed, others))
            self._weight_pages, pages._free = (
                pages._free[: self.num_weight_pages],
                pages._free[self.num_weight_pages :],
            )
            for page in self._weight_pages:
                pages.memory.discard(page)
            taken = self._take_free(self._use.min_pages)
            self._use = PageUse(num_owned=len(taken), min_pages=len(taken))
            self.is_awake = True
            return taken

    def sleep(self, given: Iterable[int]) -> None:
        """Give back the pages of the weights, and those of KV, which are all that the model has."""
        pages = self._pages
        with pages._changed:
            pages._free = [*self._weight_pages, *pages._free, *given]
            self._weight_pages = []
            self._use = PageUse(min_pages=self._use.min_pages)
            self.is_awake, self.num_asked = False, 0
            if not any(share.is_awake for share in pages.shares):
                # Nobody is about to use the memory: the system has it.
                for page in pages._free:
                    pages.memory.discard(page)
            pages._changed.notify_all()

    def _take_free(self, count: int) -> list[int]:
        free = self._pages._free
        taken = free[len(free) - count :]
        del free[len(free) - count :]
        return taken

    def _ask(self, others: Iterable["PageShare"], num_lacking: int, fair_share: int) -> None:
        for other in others:
            if num_lacking <= 0:
                return
            wanted = min(num_lacking, num_surplus(other._use, fair_share=fair_share))
            if wanted > other.num_asked:
                other.num_asked = wanted
                other.on_asked()
            num_lacking -= wanted

    def _refusal(self, needed: int, others: Iterable["PageShare"]) -> str:
        memory = self.memory
        users = ", ".join(
            f"{other.name!r} {_mib(other.num_weight_pages + other._use.num_owned, memory)} MiB" for other in others
        )
        return (
            f"model {self.name!r} needs {_mib(needed, memory)} MiB to wake up and {_mib(self._pages.num_free, memory)}"
            f" MiB are free; in use: {users or 'nothing'}. Put another model to sleep, wait until its requests are"
            " finished, or serve with more memory"
        )


def _mib(num_pages: int, memory: VirtualMemory) -> int:
    return num_pages * memory.page_bytes >> 20
