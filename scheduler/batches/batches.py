"""The batch API of one server, below HTTP: its folder, store and runner."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from starlette.requests import Request

from xllm_compile.scheduler import errors
from xllm_compile.scheduler.batches.folder import BatchFolder, new_id
from xllm_compile.scheduler.batches.metrics import BatchMetrics
from xllm_compile.scheduler.batches.records import Batch, File
from xllm_compile.scheduler.batches.runner import BatchRunner
from xllm_compile.scheduler.batches.store import BatchStore, InUseError, Order
from xllm_compile.scheduler.batches.store_thread import StoreThread
from xllm_compile.scheduler.batches.upload import Upload
from xllm_compile.scheduler.service import Service
from xllm_compile.scheduler.tasks import cancel_all

SWEEP_S = 600.0
"""Between two looks for expired files; they are not served meanwhile."""
READ_BYTES = 1 << 20
"""Of a file at once."""


class Batches:
    """Made at start-up; lives on the service's event loop from `start` to `stop`."""

    def __init__(self, folder: BatchFolder, service: Service, now: Callable[[], float] = time.time) -> None:
        """now: Unix seconds. The folder stays its opener's. Raises ValueError where its database cannot be used."""
        self._config = config = folder.config
        self._now = now
        self._folder = folder
        self._store = BatchStore(folder.database)
        self._thread = StoreThread()
        self._runner = BatchRunner(
            config, service=service, store=self._store, thread=self._thread, folder=self._folder, now=now
        )
        self._num_uploading_bytes = 0
        self._sweeper: asyncio.Task[None] | None = None
        service.metrics.register(BatchMetrics(self._store, self._runner))

    async def start(self) -> None:
        await self._thread.run(lambda: self._folder.clear(self._store.upload_ids()))
        await self._runner.start()
        self._sweeper = asyncio.create_task(self._sweep())

    async def stop(self) -> None:
        """Lines under way are given up; the next server on the folder runs them again. May be called again."""
        if self._sweeper is not None:
            await cancel_all([self._sweeper])
        await self._runner.close()

    def close(self) -> None:
        self._thread.close()
        self._store.close()

    # Files

    async def upload(self, request: Request) -> File:
        """Raises ApiError (400, 413), and ClientGoneError."""
        length = request.headers.get("content-length", "0")
        # The form around the file is some hundred bytes.
        if length.isdigit() and int(length) > self._config.max_file_bytes + (64 << 10):
            raise self._too_large()
        file_id = new_id("file-")
        num_taken = 0

        def take_bytes(num_bytes: int) -> None:
            nonlocal num_taken
            num_taken += num_bytes
            self._num_uploading_bytes += num_bytes
            if num_taken > self._config.max_file_bytes:
                raise self._too_large()
            used_bytes = self._store.used_bytes + self._num_uploading_bytes
            if used_bytes > self._config.max_disk_bytes:
                raise errors.ApiError(
                    errors.TOO_LARGE,
                    f"With this file, files and results of batches would take {used_bytes} bytes; this server keeps "
                    f"{self._config.max_disk_bytes}. Delete files, or raise --batch-disk-size.",
                    code="disk_quota_exceeded",
                )

        upload = Upload(self._folder.unfinished(file_id), take_bytes)
        try:
            await upload.read(request)
            now = int(self._now())
            file = File(
                id=file_id,
                filename=upload.filename or "",
                purpose=upload.purpose,
                num_bytes=upload.num_bytes,
                created_at=now,
                expires_at=now + upload.lifetime_s,
            )
            await asyncio.to_thread(self._folder.keep, file_id)
            await self._thread.run(self._store.add_file, file)
        except BaseException:
            self._folder.discard(file_id)
            raise
        finally:
            self._num_uploading_bytes -= num_taken
        return file

    def _too_large(self) -> errors.ApiError:
        message = (
            f"The file is larger than the {self._config.max_file_bytes} bytes this server takes; split it, or raise "
            "--batch-max-file-size."
        )
        return errors.ApiError(errors.TOO_LARGE, message, param="file", code="file_too_large")

    async def file(self, file_id: str, param: str = "file_id") -> File:
        """Raises ApiError (404)."""
        file = await self._thread.run(self._store.file, file_id, self._now())
        if file is None:
            message = f"There is no file '{file_id[:64]}'; it may have been deleted, or have expired."
            raise errors.ApiError(errors.NOT_FOUND, message, param=param, code="file_not_found")
        return file

    async def files(self, *, after: str | None, limit: int, order: Order, purpose: str | None) -> list[File]:
        number = (await self.file(after, "after")).number if after is not None else None
        return await self._thread.run(
            self._store.files, now=self._now(), after=number, limit=limit, order=order, purpose=purpose
        )

    async def delete_file(self, file: File) -> None:
        """Raises ApiError (409) for what an open batch reads."""
        try:
            await self._thread.run(self._store.delete_file, file)
        except InUseError as err:
            message = f"The file is the input of '{err}', which has not ended; cancel that first, or wait."
            raise errors.ApiError(errors.CONFLICT, message, param="file_id", code="file_in_use") from None
        if file.batch is None:
            await asyncio.to_thread(self._folder.discard, file.id)
        self._runner.disk_freed()

    async def content(self, file: File) -> AsyncIterator[bytes]:
        """Ends early where the file is deleted meanwhile."""
        if file.batch is not None:
            after = 0
            while True:
                content, after = await self._thread.run(self._store.read_output, file, after, READ_BYTES)
                if not content:
                    return
                yield content
        with await asyncio.to_thread(self._folder.upload(file.id).open, "rb") as upload:
            while content := await asyncio.to_thread(upload.read, READ_BYTES):
                yield content

    async def _sweep(self) -> None:
        while True:
            for file in await self._thread.run(self._store.expired_files, self._now()):
                with suppress(errors.ApiError):
                    await self.delete_file(file)
            await asyncio.sleep(SWEEP_S)

    # Batches

    async def create(
        self,
        *,
        input_file_id: str,
        endpoint: str,
        completion_window: str,
        window_s: int,
        metadata: dict[str, str] | None,
        output_lifetime_s: int,
    ) -> Batch:
        """Raises ApiError (404) without the file. What is wrong in the file fails the batch later."""
        await self.file(input_file_id, "input_file_id")
        now = int(self._now())
        await self._thread.run(
            self._store.add_batch,
            Batch(
                id=(batch_id := new_id("batch_")),
                endpoint=endpoint,
                input_file_id=input_file_id,
                completion_window=completion_window,
                output_lifetime_s=output_lifetime_s,
                metadata=metadata,
                created_at=now,
                expires_at=now + window_s,
            ),
        )
        batch = await self.batch(batch_id)
        self._runner.add(batch)
        return batch

    async def batch(self, batch_id: str, param: str = "batch_id") -> Batch:
        """Raises ApiError (404)."""
        batch = await self._thread.run(self._store.batch, batch_id)
        if batch is None:
            message = f"There is no batch '{batch_id[:64]}'."
            raise errors.ApiError(errors.NOT_FOUND, message, param=param, code="batch_not_found")
        return batch

    async def batches(self, *, after: str | None, limit: int) -> list[Batch]:
        number = (await self.batch(after, "after")).number if after is not None else None
        return await self._thread.run(self._store.batches, after=number, limit=limit)

    async def cancel(self, batch_id: str) -> Batch:
        """Lines without a result are given up. Raises ApiError (409) when it has ended."""
        while (batch := await self.batch(batch_id)).status in ("validating", "in_progress"):
            # Its status may have changed since it was read.
            if await self._thread.run(self._store.cancel_batch, batch, self._now()):
                self._runner.cancel(batch)
        if batch.status not in ("cancelling", "cancelled"):
            message = f"Cannot cancel a batch with status '{batch.status}'."
            raise errors.ApiError(errors.CONFLICT, message, code="batch_ended")
        return batch
