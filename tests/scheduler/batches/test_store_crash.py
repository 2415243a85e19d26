"""A process that is killed between any two statements loses nothing and repeats nothing."""

import sqlite3
import subprocess
import sys

from tests.scheduler.batches.store_fixtures import NOW, open_store
from tests.scheduler.batches.store_process import FAILED_LINE, NUM_LINES, run_batch


def check_whole(folder):
    """Counts are those of the results that are there."""
    with sqlite3.connect(folder / "batches.sqlite3") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        for number, completed, failed in database.execute("SELECT number, num_completed, num_failed FROM batches"):
            rows = database.execute("SELECT is_error, COUNT(*) FROM results WHERE batch = ? GROUP BY 1", (number,))
            counts = dict(rows.fetchall())
            assert (counts.get(0, 0), counts.get(1, 0)) == (completed, failed)


def check_goes_on(folder):
    told = int((folder / "told").read_text()) if (folder / "told").exists() else 0
    store = open_store(folder)
    batch = store.batch("batch_1")
    assert (batch.num_completed if batch else 0) >= told
    store.close()
    run_batch(folder, kill_at=0)
    check_whole(folder)
    store = open_store(folder)
    ended, output, failed = store.batch("batch_1"), store.file("file-o", NOW), store.file("file-e", NOW)
    assert ended and output and failed
    assert (ended.status, ended.num_completed, ended.num_failed) == ("completed", NUM_LINES - 1, 1)
    assert ended.output_tokens == 2 * NUM_LINES
    expected = [f"result {number}" for number in range(1, NUM_LINES + 1) if number != FAILED_LINE]
    assert store.read_output(output, 0, 1 << 20)[0].decode().splitlines() == expected
    assert failed.num_bytes == len(f"result {FAILED_LINE}\n")
    store.close()


def test_killed_before_every_statement(tmp_path):
    command = [sys.executable, "-m", "tests.scheduler.batches.store_process", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    num_statements = int(done.stdout)
    # All that it does was cut somewhere.
    assert num_statements > 4 * NUM_LINES
    for kill_at in range(1, num_statements + 1):
        check_whole(tmp_path / str(kill_at))
        check_goes_on(tmp_path / str(kill_at))
