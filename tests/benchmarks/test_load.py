"""What /proc says of this process and its children."""

import os
import subprocess
import sys
import time

from xllm_compile.benchmarks.load import ForeignLoad, process_tree
from xllm_compile.benchmarks.server_process import process_memory


def test_a_child_is_in_the_tree_while_it_lives():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert {os.getpid(), child.pid} <= set(process_tree(os.getpid()))
    finally:
        child.communicate(b"\n")
    assert child.pid not in process_tree(os.getpid())


def test_foreign_load_is_a_number_of_cores():
    with ForeignLoad() as load:
        time.sleep(0.3)
    assert 0 <= load.cores <= (os.cpu_count() or 1) * 1.1


def test_memory_of_a_process():
    found = process_memory(os.getpid())
    assert found["rss_peak"] >= found["rss"] >= found["rss_anon"] > 1 << 20
    assert found["pss"] > 0
    assert process_memory(2**22 + 1) == {}
