"""Threads that end with what they work for."""

import weakref
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread, current_thread
from typing import Any


def start_worker(
    owner: object, name: str, target: Callable[..., None], queue: "SimpleQueue[Any]", *arguments: Any
) -> Callable[[], object]:
    """Run target(queue, *arguments) in a thread of its own until it takes a None from the queue.

    It gets one when the function returned is called, the owner is freed or the process ends, and is waited for: a
    thread that frees tensors while the interpreter ends aborts the process. The arguments must not refer to the owner.
    """
    thread = Thread(target=target, args=(queue, *arguments), name=name, daemon=True)
    thread.start()
    return weakref.finalize(owner, _end, thread, queue)


def _end(thread: Thread, queue: "SimpleQueue[Any]") -> None:
    queue.put(None)
    # What the thread did last may have freed the owner.
    if thread is not current_thread():
        thread.join()
