"""The outputs of all prompts of one request as one stream that a slow reader cannot make grow."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self

from xllm_compile.runtime.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, hold
from xllm_compile.scheduler import errors
from xllm_compile.scheduler.response_metrics import response_metrics
from xllm_compile.scheduler.tasks import cancel_all


class OutputStream:
    """Merges engine iterators, one per prompt; choice c of prompt p gets index p * n + c.

    Deltas that nobody has read yet are joined per choice, so what is held is at most what the request may generate
    and a reader that fell behind catches up in one step. A single iterator is read by the reader's own task, and joins
    by itself (RequestStream, Run): a task between the two would cost each token a switch. Leaving the context ends
    whatever still runs.
    """

    def __init__(
        self, iterators: Sequence[AsyncGenerator[RequestOutput, None]], n: int, *, abort_is_error: bool = True
    ) -> None:
        """abort_is_error: raise ApiError for a choice that the server ended early; OpenAI has no reason for that."""
        self._abort_is_error = abort_is_error
        self._iterators = iterators
        self._n = n
        self._pending: dict[int, CompletionOutput] = {}
        self._wake = asyncio.Event()
        self._num_running = len(iterators)
        self._error: Exception | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.num_completion_tokens = 0
        self.num_cached_tokens = 0
        self.num_kv_tokens: int | None = None
        """See RequestOutput."""
        self._metrics: list[RequestMetrics | None] = [None] * len(iterators)
        self.prompt_logprobs: list[list[dict[int, Logprob] | None] | None] = [None] * len(iterators)
        """Per prompt, known before its first choice is read."""

    async def __aenter__(self) -> Self:
        if len(self._iterators) > 1:
            self._tasks = [asyncio.create_task(self._pump(index, item)) for index, item in enumerate(self._iterators)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await cancel_all(self._tasks)
        if not self._tasks:
            await self._iterators[0].aclose()

    async def _pump(self, prompt_index: int, iterator: AsyncGenerator[RequestOutput, None]) -> None:
        try:
            async with aclosing(iterator):
                async for output in iterator:
                    self._take(prompt_index, output)
                    self._wake.set()
        except Exception as err:
            self._error = self._error or err
        finally:
            self._num_running -= 1
            self._wake.set()

    def _take(self, prompt_index: int, output: RequestOutput) -> None:
        if output.prompt_logprobs is not None:
            self.prompt_logprobs[prompt_index] = output.prompt_logprobs
        if output.finished:
            self.num_cached_tokens += output.num_cached_tokens
            self.num_kv_tokens = output.num_kv_tokens
            self._metrics[prompt_index] = output.metrics
        for choice in output.outputs:
            self.num_completion_tokens += len(choice.token_ids)
            choice.index += prompt_index * self._n
            hold(self._pending, choice)

    @property
    def metrics(self) -> dict[str, Any]:
        """See response_metrics; once all are finished."""
        found = [metrics for metrics in self._metrics if metrics is not None]
        num_choices = len(self._iterators) * self._n
        return response_metrics(found, num_choices=num_choices, num_tokens=self.num_completion_tokens)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[CompletionOutput]:
        """What is new since the last call, one entry per choice that moved. Raises ApiError of the first failure."""
        while not self._pending:
            if self._error is not None:
                raise self._error
            if self._num_running == 0:
                raise StopAsyncIteration
            await self._wait()
        return self._pop()

    async def collect(self) -> list[CompletionOutput]:
        """Every choice in full, once all are finished. Raises ApiError of the first failure."""
        while self._num_running > 0 and self._error is None:
            await self._wait()
        if self._error is not None:
            raise self._error
        return self._pop()

    async def _wait(self) -> None:
        """Until there is something new, an end or an error."""
        if self._tasks:
            self._wake.clear()
            await self._wake.wait()
            return
        try:
            self._take(0, await anext(self._iterators[0]))
        except StopAsyncIteration:
            self._num_running = 0

    def _pop(self) -> list[CompletionOutput]:
        choices = [choice for _, choice in sorted(self._pending.items())]
        self._pending.clear()
        for choice in choices:
            if choice.finish_reason == "abort" and self._abort_is_error:
                raise errors.ApiError(errors.UNAVAILABLE, "The server ended this request early.", code="aborted")
        return choices
