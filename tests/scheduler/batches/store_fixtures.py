"""A store with one batch in it."""

from pathlib import Path

from xllm_compile.scheduler.batches.records import Batch, File, Line, Result
from xllm_compile.scheduler.batches.store import BatchStore

NOW = 1_700_000_000


def add_batch(store: BatchStore, name: str = "1") -> Batch:
    """With the input file "file-NAME", which an earlier process may have added."""
    file_id = f"file-{name}"
    if store.file(file_id, NOW) is None:
        expires_at = NOW + 1_000_000
        store.add_file(
            File(id=file_id, filename="in", purpose="batch", num_bytes=10, created_at=NOW, expires_at=expires_at)
        )
    store.add_batch(
        Batch(
            id=f"batch_{name}",
            endpoint="/v1/completions",
            input_file_id=file_id,
            completion_window="24h",
            created_at=NOW,
            expires_at=NOW + 86_400,
        )
    )
    batch = store.batch(f"batch_{name}")
    assert batch is not None
    return batch


def lines(num_lines: int) -> list[Line]:
    return [Line(number=n, offset=n * 10, num_bytes=10, custom_id=f"id {n}") for n in range(1, num_lines + 1)]


def result(batch: Batch, number: int, *, is_error: bool = False) -> Result:
    content = f"result {number}\n".encode()
    return Result(batch=batch.number, number=number, is_error=is_error, content=content, output_tokens=2)


def open_store(folder: Path) -> BatchStore:
    return BatchStore(folder / "batches.sqlite3")
