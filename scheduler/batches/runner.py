"""Runs the lines of open batches beside everything else that the service does.

Each batch has as many lines under way as the others; how many there are in all is found by in_flight.py. A line counts
as under way until its result is on disk. What becomes of batches is decided in one place, `_move_batches`.
"""

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from xllm_compile.scheduler.batches.folder import BatchConfig, BatchFolder, new_id
from xllm_compile.scheduler.batches.in_flight import InFlightLimit
from xllm_compile.scheduler.batches.input_file import CheckedInput, InputRules, check_input, read_request
from xllm_compile.scheduler.batches.line_request import LINE_LOST, SERVER_ERROR, Answer, BusyError, ask, result_of
from xllm_compile.scheduler.batches.open_batch import OpenBatch, next_batch
from xllm_compile.scheduler.batches.recorder import ResultRecorder
from xllm_compile.scheduler.batches.records import Batch, FinalStatus, Line, LineError, Result
from xllm_compile.scheduler.batches.store import BatchStore
from xllm_compile.scheduler.batches.store_thread import StoreThread
from xllm_compile.scheduler.service import Service
from xllm_compile.scheduler.tasks import cancel_all

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""Of a line that the server fails at (status 5xx) or ends with; one that it has no room for is tried until there is.

Who it was that the server ended with is not known of lines that ran together: the last attempt of each is by itself.
"""
MAX_IN_FLIGHT_BYTES = 64 << 20
"""Of request bodies under way; the last to start may exceed it."""
RECHECK_S = 5.0
"""Until what cannot go on now (disk full, engine not healthy) is tried again."""

# Lines of a batch that are read from the store at once.
_NUM_READ = 64

_LineTask = asyncio.Task[tuple[int, Result]]


class BatchRunner:
    """Lives on the service's event loop, from `start` to `close`."""

    def __init__(
        self,
        config: BatchConfig,
        *,
        service: Service,
        store: BatchStore,
        thread: StoreThread,
        folder: BatchFolder,
        now: Callable[[], float],
    ) -> None:
        """now: Unix seconds."""
        self._config = config
        self._service = service
        self._store = store
        self._thread = thread
        self._folder = folder
        self._now = now
        self._recorder = ResultRecorder(store, thread, self._on_recorded)
        self.limit = InFlightLimit()
        self.num_ended_lines: Counter[str] = Counter()
        """That this process saw end, by how."""
        self._open: dict[int, OpenBatch] = {}
        self._num_bytes_running = 0
        self._num_turns = 0
        self._has_suspect = False
        """A suspect is under way, which it is until its result is on disk."""
        self._attempts: dict[tuple[int, int], int] = {}
        """Of lines by batch and number, to be written."""
        self._is_disk_full = False
        self._one_check = asyncio.Lock()
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Go on with the batches that are open."""
        for batch in await self._thread.run(self._store.open_batches):
            self.add(batch)
        self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._recorder.run())]

    async def close(self) -> None:
        """End all that runs. What has no result by then runs again when a server takes up the folder."""
        await cancel_all(self._tasks)
        await cancel_all([task for entry in self._open.values() for task in entry.tasks])
        try:
            await self._write_attempts()
            await self._recorder.flush()
        except sqlite3.Error:
            logger.exception("results of batches could not be written; their lines run again")

    def add(self, batch: Batch) -> None:
        """Take up a batch that is in the store."""
        entry = self._open[batch.number] = OpenBatch(batch=batch, is_started=batch.status == "in_progress")
        if batch.status == "cancelling":
            entry.ends_as = "cancelled"
        elif batch.status == "validating":
            task = asyncio.create_task(self._check(batch))
            entry.tasks.add(task)
            task.add_done_callback(partial(self._check_ended, entry))
        self._wake.set()

    def cancel(self, batch: Batch) -> None:
        """End a batch that is cancelling in the store, and what runs of it."""
        if (entry := self._open.get(batch.number)) is not None:
            self._stop(entry, "cancelled")

    def disk_freed(self) -> None:
        """Look whether lines that waited for room may start."""
        self._wake.set()

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self._write_attempts()
                for entry in list(self._open.values()):
                    await self._move_batch(entry)
                await self._start_lines()
                due_s = self._next_due_s()
            except Exception:
                logger.exception("batches do not go on; trying again in %g s", RECHECK_S)
                due_s = RECHECK_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(due_s):
                    await self._wake.wait()

    def _next_due_s(self) -> float | None:
        """Seconds until there is something to do that nothing tells of."""
        now_s = time.monotonic()
        due_s = [entry.batch.expires_at - self._now() for entry in self._open.values()]
        ready = [entry for entry in self._open.values() if entry.has_lines]
        if ready:
            held_s = [self.limit.held_until_s - now_s, *(entry.held_until_s - now_s for entry in ready)]
            due_s += [each for each in held_s if each > 0]
            if self._is_disk_full or not self._is_able():
                due_s.append(RECHECK_S)
        return max(0.0, min(due_s)) if due_s else None

    # Batches

    async def _move_batch(self, entry: OpenBatch) -> None:
        if self._now() >= entry.batch.expires_at:
            self._stop(entry, "expired")
        if entry.checked is not None:
            await self._take_up(entry, entry.checked)
        elif entry.ends_as is None and entry.is_complete:
            await self._end(entry, "completed")
        elif entry.ends_as is not None and entry.num_running == 0:
            await self._end(entry, entry.ends_as)

    async def _check(self, batch: Batch) -> CheckedInput:
        rules = InputRules(
            endpoint=batch.endpoint,
            max_lines=self._config.max_lines,
            max_line_bytes=self._service.max_body_bytes,
            check_model=self._service.for_model,
        )
        async with self._one_check:
            return await asyncio.to_thread(_check_or_refuse, self._folder.upload(batch.input_file_id), rules)

    def _check_ended(self, entry: OpenBatch, task: "asyncio.Task[CheckedInput]") -> None:
        entry.tasks.discard(task)
        if not task.cancelled():
            entry.checked = task.result()
        self._wake.set()

    async def _take_up(self, entry: OpenBatch, checked: CheckedInput) -> None:
        """The store moves a batch only if nothing else did before; what did ends it here as well."""
        batch = entry.batch
        if checked.errors:
            await self._thread.run(self._store.fail_batch, batch.number, checked.errors, self._now())
            logger.info("%s: its input was refused for %d errors", batch.id, len(checked.errors))
            entry.ends_as = entry.ends_as or "cancelled"
        else:
            await self._thread.run(self._store.start_batch, batch.number, checked.lines, self._now())
            logger.info("%s: %d lines", batch.id, len(checked.lines))
            entry.is_started = True
        entry.checked = None
        self._wake.set()

    def _stop(self, entry: OpenBatch, status: FinalStatus) -> None:
        if entry.ends_as is None:
            entry.ends_as = status
            for task in entry.tasks:
                task.cancel()
            self._wake.set()

    async def _end(self, entry: OpenBatch, status: FinalStatus) -> None:
        file_ids = (new_id("file-"), new_id("file-"))
        ended = await self._thread.run(self._store.end_batch, entry.batch.number, status, file_ids, self._now())
        del self._open[entry.batch.number]
        if ended is not None:
            num_unrun = ended.num_lines - ended.num_completed - ended.num_failed
            self.num_ended_lines[status] += num_unrun
            logger.info(
                "%s: %s, %d of %d lines completed, %d failed, %d not run",
                *(ended.id, status, ended.num_completed, ended.num_lines, ended.num_failed, num_unrun),
            )

    # Lines

    async def _start_lines(self) -> None:
        if self._next_batch() is None or not self._may_start() or not self._has_disk():
            return
        is_noted, is_done = asyncio.get_running_loop().create_future(), False
        try:
            while self._may_start() and (entry := self._next_batch()) is not None:
                if not entry.waiting:
                    await self._read_lines(entry)
                elif entry.has_lines:
                    if entry.waiting[0].number in entry.suspects:
                        if any(each.num_running for each in self._open.values()):
                            break
                        self._has_suspect = True
                    self._start_line(entry, entry.waiting.popleft(), is_noted)
            await self._write_attempts()
            is_done = True
        finally:
            is_noted.set_result(is_done)

    async def _write_attempts(self) -> None:
        counts, self._attempts = self._attempts, {}
        if not counts:
            return
        try:
            await self._thread.run(self._store.note_attempts, counts)
        except BaseException:
            self._attempts = counts | self._attempts
            raise

    def _next_batch(self) -> OpenBatch | None:
        return next_batch(self._open.values(), time.monotonic())

    def _may_start(self) -> bool:
        has_room = self._num_bytes_running < MAX_IN_FLIGHT_BYTES
        return has_room and not self._has_suspect and self._is_able() and self.limit.may_start(time.monotonic())

    def _is_able(self) -> bool:
        return self._service.is_ready and not self._recorder.is_failing

    def _has_disk(self) -> bool:
        used_bytes, was_full = self._store.used_bytes, self._is_disk_full
        self._is_disk_full = used_bytes >= self._config.max_disk_bytes
        if self._is_disk_full and not was_full:
            logger.warning(
                "batches wait: files and results take %d bytes, --batch-disk-size is %d; delete files or raise it",
                *(used_bytes, self._config.max_disk_bytes),
            )
        return not self._is_disk_full

    async def _read_lines(self, entry: OpenBatch) -> None:
        lines = await self._thread.run(self._store.pending_lines, entry.batch.number, entry.last_read, _NUM_READ)
        for line in lines:
            if line.num_attempts >= MAX_ATTEMPTS:
                logger.error("%s: line %d was under way each time that the server ended", entry.batch.id, line.number)
                self._record(entry, result_of(entry.batch.number, line, LINE_LOST))
                continue
            if line.num_attempts == MAX_ATTEMPTS - 1:
                entry.suspects.add(line.number)
            entry.waiting.append(line)
        if lines:
            entry.last_read = lines[-1].number
        if len(lines) < _NUM_READ:
            entry.is_read = True
            # There may have been nothing left to run.
            self._wake.set()

    def _start_line(self, entry: OpenBatch, line: Line, is_noted: "asyncio.Future[bool]") -> None:
        self._num_turns += 1
        entry.turn = self._num_turns
        self._num_bytes_running += line.num_bytes
        self.limit.started()
        self._attempts[entry.batch.number, line.number] = line.num_attempts + 1
        task = asyncio.create_task(self._run_line(entry.batch, line, is_noted))
        entry.tasks.add(task)
        # Not in the task itself: one that is cancelled before its first step does nothing at all.
        task.add_done_callback(partial(self._line_ended, entry, line, time.monotonic()))

    async def _run_line(self, batch: Batch, line: Line, is_noted: "asyncio.Future[bool]") -> tuple[int, Result]:
        """The status of its answer, and that. Raises BusyError when the line is to run again.

        is_noted: that it was begun is on disk, or could not be written.
        """
        if not await asyncio.shield(is_noted):
            raise BusyError(RECHECK_S, is_overloaded=False)
        answer = await self._answer(batch, line)
        return answer.status, result_of(batch.number, line, answer)

    async def _answer(self, batch: Batch, line: Line) -> Answer:
        try:
            body = await asyncio.to_thread(read_request, self._folder.upload(batch.input_file_id), line)
        except (OSError, ValueError, KeyError) as err:
            logger.error("%s: line %d cannot be read: %s", batch.id, line.number, err)
            return SERVER_ERROR
        return await ask(self._service, batch.endpoint, body)

    def _line_ended(self, entry: OpenBatch, line: Line, started_s: float, task: _LineTask) -> None:
        entry.tasks.discard(task)
        self._num_bytes_running -= line.num_bytes
        self._wake.set()
        self._has_suspect = False
        if task.cancelled():
            self.limit.stopped()
            self._attempts[entry.batch.number, line.number] = line.num_attempts
            return
        error = task.exception()
        if isinstance(error, BusyError):
            now_s = time.monotonic()
            if error.may_be_cause:
                line = replace(line, num_attempts=line.num_attempts + 1)
            else:
                self._attempts[entry.batch.number, line.number] = line.num_attempts
            if error.is_overloaded:
                self.limit.refused(started_s=started_s, now_s=now_s, retry_after_s=error.retry_after_s)
            else:
                # Its model is asleep, say; other batches may go on.
                self.limit.stopped()
                entry.held_until_s = now_s + error.retry_after_s
            entry.waiting.appendleft(line)
            return
        self.limit.ended(num_waiting=sum(each.engine.stats().num_waiting for each in self._service.services))
        if error is not None:
            logger.error("%s: line %d failed", entry.batch.id, line.number, exc_info=error)
            status, result = SERVER_ERROR.status, result_of(entry.batch.number, line, SERVER_ERROR)
        else:
            status, result = task.result()
        if status >= 500 and line.num_attempts + 1 < MAX_ATTEMPTS:
            entry.waiting.appendleft(replace(line, num_attempts=line.num_attempts + 1))
            return
        self._has_suspect = line.number in entry.suspects
        self._record(entry, result)

    def _record(self, entry: OpenBatch, result: Result) -> None:
        entry.num_unrecorded += 1
        self._recorder.add(result)

    def _on_recorded(self, result: Result) -> None:
        entry = self._open[result.batch]
        entry.num_unrecorded -= 1
        if result.number in entry.suspects:
            self._has_suspect = False
        self.num_ended_lines["failed" if result.is_error else "completed"] += 1
        self._wake.set()


def _check_or_refuse(path: Path, rules: InputRules) -> CheckedInput:
    try:
        return check_input(path, rules)
    except OSError as err:
        message = f"The input file cannot be read: {err.strerror}."
        return CheckedInput(errors=[LineError(code="file_not_readable", message=message)])
