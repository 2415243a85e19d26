"""The batch API's database: all SQL is here.

One SQLite file in WAL mode with full synchronisation: what a method wrote is on disk when it returns, whole or not at
all. A line is pending while it has no result, and the primary key of `results` allows one: a line that was under way
when the process died runs again, and is recorded once. The rows of `results` are the output files: nothing is copied
when a batch ends, and a batch that is cut off has what was answered so far.

A store is used by one thread at a time, and by one process (folder.py holds the lock).
"""

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

from xllm_compile.scheduler.batches.records import (
    FINAL_STATUSES,
    OPEN_STATUSES,
    Batch,
    BatchStatus,
    File,
    FinalStatus,
    Line,
    LineError,
    Result,
)

SCHEMA_VERSION = 2

_MAX_KEPT_JOURNAL_BYTES = 64 << 20
# Most that one deletion gives back to the file system, because moving pages holds up everything else; the other free
# pages are used again.
_VACUUM_PAGES = 16384

# Columns are named as the fields of the records.
_SCHEMA = """
CREATE TABLE files (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    filename TEXT NOT NULL,
    purpose TEXT NOT NULL,
    num_bytes INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    batch INTEGER REFERENCES batches (number),
    is_error INTEGER NOT NULL
);
CREATE TABLE batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    input_file_id TEXT NOT NULL,
    completion_window TEXT NOT NULL,
    output_lifetime_s INTEGER NOT NULL,
    metadata TEXT,
    created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    in_progress_at INTEGER,
    completed_at INTEGER,
    failed_at INTEGER,
    expired_at INTEGER,
    cancelling_at INTEGER,
    cancelled_at INTEGER,
    output_file_id TEXT,
    error_file_id TEXT,
    errors TEXT NOT NULL,
    num_lines INTEGER NOT NULL,
    num_completed INTEGER NOT NULL,
    num_failed INTEGER NOT NULL,
    num_output_bytes INTEGER NOT NULL,
    num_error_bytes INTEGER NOT NULL,
    input_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL
);
CREATE INDEX batches_by_status ON batches (status);
CREATE TABLE lines (
    batch INTEGER NOT NULL REFERENCES batches (number),
    number INTEGER NOT NULL,
    offset INTEGER NOT NULL,
    num_bytes INTEGER NOT NULL,
    custom_id TEXT NOT NULL,
    PRIMARY KEY (batch, number)
) WITHOUT ROWID;
CREATE TABLE results (
    batch INTEGER NOT NULL REFERENCES batches (number),
    number INTEGER NOT NULL,
    is_error INTEGER NOT NULL,
    content BLOB NOT NULL,
    PRIMARY KEY (batch, number)
);
"""

# New in version 2.
_ATTEMPTS = """
CREATE TABLE attempts (
    batch INTEGER NOT NULL REFERENCES batches (number),
    number INTEGER NOT NULL,
    num_attempts INTEGER NOT NULL,
    PRIMARY KEY (batch, number)
) WITHOUT ROWID;
"""

# Of a line that never ran, by how its batch ended.
_UNRUN = {
    "expired": ("batch_expired", "This request could not be executed before the completion window expired."),
    "cancelled": ("batch_cancelled", "This request was not executed before the batch was cancelled."),
}

Order = Literal["asc", "desc"]


class InUseError(Exception):
    """The file is the input of an open batch, whose id the message is."""


class BatchStore:
    """Methods that change something are one transaction each."""

    def __init__(self, path: Path) -> None:
        """Makes the database where there is none. Raises ValueError when ``path`` is none, or of another version."""
        # Opened at start-up, used in the thread of the store.
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            self._prepare()
        except sqlite3.DatabaseError as err:
            self._db.close()
            raise ValueError(f"{path} is no database of batches ({err}); choose another --batch-dir") from err
        except ValueError as err:
            self._db.close()
            raise ValueError(f"{path} {err}; choose another --batch-dir") from None
        self._db.row_factory = sqlite3.Row
        self.num_batches: Counter[str] = Counter()
        """By status."""
        for status, count in self._db.execute("SELECT status, COUNT(*) FROM batches GROUP BY status"):
            self.num_batches[status] = count
        row = self._db.execute(
            f"SELECT TOTAL(num_lines - num_completed - num_failed) FROM batches WHERE status IN {OPEN_STATUSES}"
        ).fetchone()
        self.num_pending_lines = int(row[0])
        """Lines of open batches without a result."""
        row = self._db.execute(
            """SELECT (SELECT TOTAL(num_bytes) FROM files WHERE batch IS NULL)
                    + (SELECT TOTAL(num_output_bytes + num_error_bytes) FROM batches)"""
        ).fetchone()
        self.used_bytes = int(row[0])
        """Of uploads and results. This and the counts above may be read from any thread."""

    def _prepare(self) -> None:
        # Pages of deleted results go back to the file system; to be said before the first table is made.
        self._db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute(f"PRAGMA journal_size_limit = {_MAX_KEPT_JOURNAL_BYTES}")
        self._db.execute("PRAGMA foreign_keys = ON")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version in (0, 1):
            missing = _ATTEMPTS if version == 1 else _SCHEMA + _ATTEMPTS
            self._db.executescript(f"BEGIN IMMEDIATE; {missing} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        elif version != SCHEMA_VERSION:
            raise ValueError(f"has version {version}, this program reads version {SCHEMA_VERSION}")

    def close(self) -> None:
        self._db.close()

    def trace(self, callback: Any) -> None:
        """Call back with each statement before it runs. For tests that end the process there."""
        self._db.set_trace_callback(callback)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    # Files

    def add_file(self, file: File) -> None:
        with self._transaction():
            self._insert_file(file)
        self.used_bytes += file.num_bytes

    def _insert_file(self, file: File) -> None:
        self._insert("files", asdict(file))

    def file(self, file_id: str, now: float) -> File | None:
        """None when there is none, or it has expired."""
        row = self._db.execute("SELECT * FROM files WHERE id = ? AND expires_at > ?", (file_id, now)).fetchone()
        return None if row is None else _file(row)

    def files(
        self, *, now: float, after: int | None, limit: int, order: Order = "desc", purpose: str | None = None
    ) -> list[File]:
        """A page, beginning behind the file of number ``after``."""
        clause, arguments = _page(after, order)
        rows = self._db.execute(
            f"SELECT * FROM files WHERE expires_at > ? AND purpose = IFNULL(?, purpose) {clause}",
            (now, purpose, *arguments, limit),
        )
        return [_file(row) for row in rows]

    def upload_ids(self) -> set[str]:
        return {row[0] for row in self._db.execute("SELECT id FROM files WHERE batch IS NULL")}

    def expired_files(self, now: float) -> list[File]:
        """Without the inputs of open batches."""
        rows = self._db.execute(
            f"""SELECT * FROM files WHERE expires_at <= ? AND id NOT IN
                (SELECT input_file_id FROM batches WHERE status IN {OPEN_STATUSES})""",
            (now,),
        )
        return [_file(row) for row in rows]

    def delete_file(self, file: File) -> None:
        """With its results, where it is the output of a batch. Raises InUseError."""
        with self._transaction():
            user = self._db.execute(
                f"SELECT id FROM batches WHERE input_file_id = ? AND status IN {OPEN_STATUSES}", (file.id,)
            ).fetchone()
            if user is not None:
                raise InUseError(user[0])
            self._db.execute("DELETE FROM files WHERE number = ?", (file.number,))
            if file.batch is not None:
                self._db.execute("DELETE FROM results WHERE batch = ? AND is_error = ?", (file.batch, file.is_error))
                column = _bytes_column(file.is_error)
                self._db.execute(f"UPDATE batches SET {column} = 0 WHERE number = ?", (file.batch,))
        self.used_bytes -= file.num_bytes
        self._db.execute(f"PRAGMA incremental_vacuum({_VACUUM_PAGES})").fetchall()

    def read_output(self, file: File, after: int, max_bytes: int) -> tuple[bytes, int]:
        """About max_bytes of an output, from the lines behind number ``after``; and the last number of them.

        Empty at the end.
        """
        content = bytearray()
        rows = self._db.execute(
            "SELECT number, content FROM results WHERE batch = ? AND is_error = ? AND number > ? ORDER BY number",
            (file.batch, file.is_error, after),
        )
        for number, line in rows:
            content += line
            after = number
            if len(content) >= max_bytes:
                break
        rows.close()
        return bytes(content), after

    # Batches

    def add_batch(self, batch: Batch) -> None:
        with self._transaction():
            values = {**asdict(batch), "metadata": json.dumps(batch.metadata), "errors": _errors_json(batch.errors)}
            self._insert("batches", values)
        self.num_batches[batch.status] += 1

    def batch(self, batch_id: str) -> Batch | None:
        row = self._db.execute("SELECT * FROM batches WHERE id = ?", (batch_id,)).fetchone()
        return None if row is None else _batch(row)

    def batches(self, *, after: int | None, limit: int) -> list[Batch]:
        """A page, newest first, beginning behind the batch of number ``after``."""
        clause, arguments = _page(after, "desc")
        rows = self._db.execute(f"SELECT * FROM batches WHERE TRUE {clause}", (*arguments, limit))
        return [_batch(row) for row in rows]

    def open_batches(self) -> list[Batch]:
        """What a process that starts goes on with, oldest first."""
        rows = self._db.execute(f"SELECT * FROM batches WHERE status IN {OPEN_STATUSES} ORDER BY number")
        return [_batch(row) for row in rows]

    def start_batch(self, number: int, lines: Sequence[Line], now: float) -> bool:
        """Its input was found good. False when it is not waiting for that any more."""
        with self._transaction():
            if not self._move(number, "validating", "in_progress", now, num_lines=len(lines)):
                return False
            self._db.executemany(
                "INSERT INTO lines VALUES (?, ?, ?, ?, ?)",
                ((number, line.number, line.offset, line.num_bytes, line.custom_id) for line in lines),
            )
        self._moved("validating", "in_progress")
        self.num_pending_lines += len(lines)
        return True

    def fail_batch(self, number: int, errors: Sequence[LineError], now: float) -> bool:
        """Its input was refused. False when it is not waiting for that any more."""
        with self._transaction():
            if not self._move(number, "validating", "failed", now, errors=_errors_json(errors)):
                return False
        self._moved("validating", "failed")
        return True

    def cancel_batch(self, batch: Batch, now: float) -> bool:
        """False when its status is another by now."""
        with self._transaction():
            if not self._move(batch.number, batch.status, "cancelling", now):
                return False
        self._moved(batch.status, "cancelling")
        return True

    def pending_lines(self, batch: int, after: int, limit: int) -> list[Line]:
        """Lines without a result behind number ``after``, in order."""
        rows = self._db.execute(
            """SELECT number, offset, num_bytes, custom_id, IFNULL((SELECT num_attempts FROM attempts
               WHERE attempts.batch = lines.batch AND attempts.number = lines.number), 0) AS num_attempts
               FROM lines WHERE batch = ? AND number > ? AND NOT EXISTS
               (SELECT 1 FROM results WHERE results.batch = lines.batch AND results.number = lines.number)
               ORDER BY number LIMIT ?""",
            (batch, after, limit),
        )
        return [Line(**row) for row in rows]

    def note_attempts(self, counts: Mapping[tuple[int, int], int]) -> None:
        """How often lines, by the numbers of their batch and themselves, were begun: what is on disk if this ends."""
        with self._transaction():
            self._db.executemany(
                """INSERT OR REPLACE INTO attempts SELECT ?1, ?2, ?3 WHERE EXISTS
                   (SELECT 1 FROM lines WHERE batch = ?1 AND number = ?2)""",
                [(batch, number, count) for (batch, number), count in counts.items()],
            )

    def record(self, results: Sequence[Result]) -> None:
        """Results with the counts that they change. One that is there already, or whose batch has ended, is dropped."""
        num_recorded = num_bytes = 0
        with self._transaction():
            for result in results:
                done = self._db.execute(
                    """INSERT INTO results (batch, number, is_error, content) SELECT ?, ?, ?, ? WHERE EXISTS
                       (SELECT 1 FROM lines WHERE batch = ? AND number = ?) ON CONFLICT DO NOTHING""",
                    (
                        *(result.batch, result.number, result.is_error, result.content),
                        *(result.batch, result.number),
                    ),
                )
                if done.rowcount != 1:
                    continue
                num_recorded += 1
                num_bytes += len(result.content)
                count, size = "num_failed" if result.is_error else "num_completed", _bytes_column(result.is_error)
                self._db.execute(
                    f"""UPDATE batches SET {count} = {count} + 1, {size} = {size} + ?, input_tokens = input_tokens + ?,
                        cached_tokens = cached_tokens + ?, output_tokens = output_tokens + ? WHERE number = ?""",
                    (
                        *(len(result.content), result.input_tokens, result.cached_tokens, result.output_tokens),
                        result.batch,
                    ),
                )
        self.num_pending_lines -= num_recorded
        self.used_bytes += num_bytes

    def end_batch(self, number: int, status: FinalStatus, file_ids: tuple[str, str], now: float) -> Batch | None:
        """The batch as it ended, with its output and error files; their ids are ``file_ids`` where there are any lines.

        Lines that never ran are in the error file. None when it had ended before.
        """
        assert status in FINAL_STATUSES
        with self._transaction():
            row = self._db.execute("SELECT * FROM batches WHERE number = ?", (number,)).fetchone()
            before = _batch(row)
            if before.status not in OPEN_STATUSES:
                return None
            if status in _UNRUN:
                self._add_unrun(before, *_UNRUN[status])
            for is_error, file_id in zip((False, True), file_ids, strict=True):
                self._add_output(before, file_id, now, is_error=is_error)
            self._move(number, before.status, status, now)
            self._db.execute("DELETE FROM lines WHERE batch = ?", (number,))
            self._db.execute("DELETE FROM attempts WHERE batch = ?", (number,))
            row = self._db.execute("SELECT * FROM batches WHERE number = ?", (number,)).fetchone()
        self._moved(before.status, status)
        after = _batch(row)
        self.num_pending_lines -= after.num_lines - after.num_completed - after.num_failed
        self.used_bytes += after.num_error_bytes - before.num_error_bytes
        return after

    def _add_unrun(self, batch: Batch, code: str, message: str) -> None:
        """Results for the lines without one; they count as neither completed nor failed."""
        added = self._db.execute(
            """INSERT INTO results (batch, number, is_error, content)
               SELECT batch, number, TRUE, CAST(json_object(
                   'id', 'batch_req_' || lower(hex(randomblob(16))), 'custom_id', custom_id, 'response', NULL,
                   'error', json_object('code', ?, 'message', ?)) || char(10) AS BLOB)
               FROM lines WHERE batch = ? AND NOT EXISTS
               (SELECT 1 FROM results WHERE results.batch = lines.batch AND results.number = lines.number)""",
            (code, message, batch.number),
        ).rowcount
        if added:
            self._db.execute(
                """UPDATE batches SET num_error_bytes =
                   (SELECT SUM(length(content)) FROM results WHERE batch = ?1 AND is_error) WHERE number = ?1""",
                (batch.number,),
            )

    def _add_output(self, batch: Batch, file_id: str, now: float, *, is_error: bool) -> None:
        kind, size = ("error" if is_error else "output"), _bytes_column(is_error)
        row = self._db.execute(f"SELECT {size} FROM batches WHERE number = ?", (batch.number,)).fetchone()
        if row[0] == 0:
            return
        self._insert_file(
            File(
                id=file_id,
                filename=f"{batch.id}_{kind}.jsonl",
                purpose="batch_output",
                num_bytes=row[0],
                created_at=int(now),
                expires_at=int(now) + batch.output_lifetime_s,
                batch=batch.number,
                is_error=is_error,
            )
        )
        self._db.execute(f"UPDATE batches SET {kind}_file_id = ? WHERE number = ?", (file_id, batch.number))

    def _insert(self, table: str, values: dict[str, Any]) -> None:
        """All columns but the number, which the table gives."""
        del values["number"]
        marks = ", ".join("?" * len(values))
        self._db.execute(f"INSERT INTO {table} ({', '.join(values)}) VALUES ({marks})", tuple(values.values()))

    def _move(self, number: int, before: BatchStatus, after: BatchStatus, now: float, **values: int | str) -> bool:
        """Change the status and note when; False when it is not ``before``."""
        values = {"status": after, f"{after}_at": int(now), **values}
        assignments = ", ".join(f"{column} = ?" for column in values)
        done = self._db.execute(
            f"UPDATE batches SET {assignments} WHERE number = ? AND status = ?", (*values.values(), number, before)
        )
        return done.rowcount == 1

    def _moved(self, before: BatchStatus, after: BatchStatus) -> None:
        self.num_batches[before] -= 1
        self.num_batches[after] += 1


def _page(after: int | None, order: Order) -> tuple[str, tuple[int, ...]]:
    """The end of a query, which takes the arguments and then the limit."""
    direction = "DESC" if order == "desc" else "ASC"
    if after is None:
        return f"ORDER BY number {direction} LIMIT ?", ()
    return f"AND number {'<' if order == 'desc' else '>'} ? ORDER BY number {direction} LIMIT ?", (after,)


def _bytes_column(is_error: bool) -> str:
    return "num_error_bytes" if is_error else "num_output_bytes"


def _errors_json(errors: Sequence[LineError]) -> str:
    return json.dumps([asdict(error) for error in errors])


def _file(row: sqlite3.Row) -> File:
    values = dict(row)
    return File(**{**values, "is_error": bool(values["is_error"])})


_BATCH_FIELDS = frozenset(field.name for field in fields(Batch))


def _batch(row: sqlite3.Row) -> Batch:
    values = {name: row[name] for name in _BATCH_FIELDS}
    errors = tuple(LineError(**error) for error in json.loads(values["errors"]))
    return Batch(**{**values, "metadata": json.loads(values["metadata"]), "errors": errors})
