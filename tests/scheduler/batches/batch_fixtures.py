"""Input files, and a client's steps from an upload to the results."""

import asyncio
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.scheduler.service_fixtures import MAX_MODEL_LEN, byte_tokenizer
from xllm_compile.scheduler.batches.api import BatchApi
from xllm_compile.scheduler.batches.batches import Batches
from xllm_compile.scheduler.batches.folder import BatchConfig, BatchFolder
from xllm_compile.scheduler.engine_client import EngineClient
from xllm_compile.scheduler.http_api import build_app
from xllm_compile.scheduler.service import Service

COMPLETIONS = "/v1/completions"
ENDED = ("completed", "failed", "expired", "cancelled")


def line(custom_id: str, *, url: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"prompt": "a", "max_tokens": 3} | body}


def jsonl(lines: Sequence[Any]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


@dataclass
class Clock:
    now: float = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class BatchServer:
    """The batch API over an engine; `stop` and `start` are a restart."""

    engine: EngineClient
    folder: Path
    options: dict[str, Any] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)

    async def start(self) -> "BatchServer":
        service = Service(
            engine=self.engine,
            tokenizer=byte_tokenizer(),
            model_names=("counter",),
            max_model_len=MAX_MODEL_LEN,
            version="1",
        )
        self._opened = BatchFolder(BatchConfig(folder=self.folder, **self.options))
        self.batches = Batches(self._opened, service, self.clock)
        await self.batches.start()
        transport = httpx.ASGITransport(app=build_app(service, BatchApi(self.batches).routes()))
        self.client = httpx.AsyncClient(transport=transport, base_url="http://test")
        return self

    async def stop(self) -> None:
        await self.client.aclose()
        await self.batches.stop()
        self.batches.close()
        self._opened.close()

    async def kill(self, folder: Path) -> None:
        """And start again with what is on disk now, which is copied to the folder."""
        shutil.copytree(self.folder, folder)
        await self.stop()
        self.folder = folder
        await self.start()

    async def upload(self, content: bytes, **data: str) -> httpx.Response:
        form = {"purpose": "batch"} | data
        return await self.client.post("/v1/files", data=form, files={"file": ("in.jsonl", content)})

    async def create(self, lines: Sequence[Any] | bytes, **options: Any) -> dict[str, Any]:
        """A batch over an upload of the lines."""
        uploaded = await self.upload(lines if isinstance(lines, bytes) else jsonl(lines))
        assert uploaded.status_code == 200, uploaded.text
        body = {"input_file_id": uploaded.json()["id"], "endpoint": COMPLETIONS, "completion_window": "24h"} | options
        created = await self.client.post("/v1/batches", json=body)
        assert created.status_code == 200, created.text
        return created.json()

    async def batch(self, batch_id: str) -> dict[str, Any]:
        return (await self.client.get(f"/v1/batches/{batch_id}")).json()

    async def until(self, batch_id: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        async with asyncio.timeout(30):
            while not condition(batch := await self.batch(batch_id)):
                await asyncio.sleep(0.01)
        return batch

    async def ended(self, batch_id: str) -> dict[str, Any]:
        return await self.until(batch_id, lambda batch: batch["status"] in ENDED)

    async def content(self, file_id: str | None) -> list[dict[str, Any]]:
        """The lines of an output or error file."""
        if file_id is None:
            return []
        response = await self.client.get(f"/v1/files/{file_id}/content")
        assert response.status_code == 200, response.text
        assert len(response.content) == (await self.client.get(f"/v1/files/{file_id}")).json()["bytes"]
        return [json.loads(each) for each in response.text.splitlines()]
