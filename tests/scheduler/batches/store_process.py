"""Takes batches from an upload to their end in processes that kill themselves before one of their SQL statements.

python -m tests.scheduler.batches.store_process FOLDER: makes a folder in it per statement, and prints their number.
"""

import os
import signal
import sys
import traceback
from pathlib import Path

from tests.scheduler.batches.store_fixtures import NOW, add_batch, lines, open_store, result

NUM_LINES = 4
FAILED_LINE = 3


def run_batch(folder: Path, kill_at: int) -> None:
    """Goes on where an earlier process ended, as the runner does. What clients are told is in the file "told"."""
    store = open_store(folder)
    num_statements = 0

    def count(_statement: str) -> None:
        nonlocal num_statements
        num_statements += 1
        if num_statements == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    store.trace(count)
    batch = store.batch("batch_1") or add_batch(store)
    if batch.status == "validating":
        store.start_batch(batch.number, lines(NUM_LINES), NOW)
    for line in store.pending_lines(batch.number, 0, NUM_LINES):
        store.record([result(batch, line.number, is_error=line.number == FAILED_LINE)])
        told = store.batch("batch_1")
        assert told is not None
        (folder / "told").write_text(str(told.num_completed))
    store.end_batch(batch.number, "completed", ("file-o", "file-e"), NOW)


def run_in_process(folder: Path, kill_at: int) -> int:
    """Its wait status. Forked: an interpreter that starts takes longer than all that is tested."""
    pid = os.fork()
    if pid == 0:
        try:
            run_batch(folder, kill_at)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def main(folder: Path) -> None:
    kill_at = 0
    while True:
        kill_at += 1
        case = folder / str(kill_at)
        case.mkdir()
        status = run_in_process(case, kill_at)
        if status == 0:
            print(kill_at - 1)
            return
        assert os.WIFSIGNALED(status), f"statement {kill_at}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
