import subprocess
import sys
import threading
from queue import SimpleQueue

from xllm_compile.runtime.worker_thread import start_worker

_SCRIPT = """
import time
from queue import SimpleQueue
from xllm_compile.runtime.worker_thread import start_worker

class Owner:
    pass

def work(queue):
    while (item := queue.get()) is not None:
        print(item)
    time.sleep(0.2)
    print("ended")

owner, queue = Owner(), SimpleQueue()
start_worker(owner, "worker", work, queue)
queue.put("worked")
"""


class Owner:
    """What nobody else refers to."""


def started(name):
    (thread,) = (thread for thread in threading.enumerate() if thread.name == name)
    return thread


def test_the_process_waits_for_it():
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["worked", "ended"]


def test_whoever_frees_the_owner_waits_for_it():
    owner, taken = Owner(), []
    items: SimpleQueue[int] = SimpleQueue()

    def work(queue):
        while (item := queue.get()) is not None:
            taken.append(item)

    start_worker(owner, "waited-for", work, items)
    thread = started("waited-for")
    items.put(1)
    assert thread.is_alive()
    del owner
    assert taken == [1] and not thread.is_alive()


def test_it_may_be_the_one_that_frees_the_owner():
    owners = [Owner()]
    items: SimpleQueue[int] = SimpleQueue()

    def work(queue):
        while queue.get() is not None:
            owners.clear()

    start_worker(owners[0], "freeing", work, items)
    thread = started("freeing")
    items.put(1)
    thread.join(timeout=60)
    assert not thread.is_alive()
