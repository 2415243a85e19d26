"""A thread that computes the masks of structured outputs beside the forward pass before which they are not needed."""

import logging
from collections.abc import Callable, Iterable
from queue import SimpleQueue

from xllm_compile.runtime.token_matcher import TokenMatcher
from xllm_compile.runtime.worker_thread import start_worker

logger = logging.getLogger(__name__)


class MaskWorker:
    """The thread starts with the first matcher, and ends with the worker or `close`."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[list[TokenMatcher] | None] = SimpleQueue()
        self._end_thread: Callable[[], object] | None = None

    def prepare(self, matchers: Iterable[TokenMatcher | None]) -> None:
        """Have the masks of their present states computed. Returns at once; whoever needs one waits for it."""
        wanted = [matcher for matcher in matchers if matcher is not None]
        if not wanted:
            return
        if self._end_thread is None:
            self._end_thread = start_worker(self, "xllm-masks", _serve, self._queue)
        self._queue.put(wanted)

    def close(self) -> None:
        if self._end_thread is not None:
            self._end_thread()


def _serve(queue: "SimpleQueue[list[TokenMatcher] | None]") -> None:
    while (matchers := queue.get()) is not None:
        for matcher in matchers:
            try:
                matcher.prepare()
            except Exception:
                # Whoever asks for the mask meets the same error, and fails with it.
                logger.exception("the mask of a structured output cannot be computed")
