"""The requests of one gateway on this instance: many on one stream, what a step brings in one message."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

from xllm_compile.runtime.async_engine import AsyncEngine
from xllm_compile.runtime.outputs import RequestOutput
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.scheduler import errors
from xllm_compile.scheduler.engine_errors import to_api_error
from xllm_compile.scheduler.grpc_convert import (
    choice_message,
    hand_over_of,
    metrics_message,
    prompt_logprobs_messages,
    prompt_of,
    resume_of,
    sampling_params_of,
)
from xllm_compile.scheduler.proto import xllm_pb2
from xllm_compile.scheduler.request_trace import COMPLETION
from xllm_compile.scheduler.response_metrics import response_metrics
from xllm_compile.scheduler.service import Service
from xllm_compile.scheduler.tasks import cancel_all

logger = logging.getLogger(__name__)


class InstanceRuns:
    """Lives as long as the stream; leaving `messages` ends all that it started."""

    def __init__(self, service: Service, engine: AsyncEngine) -> None:
        """engine is the service's."""
        self._service = service
        self._engine = engine
        self._outbox = xllm_pb2.RunResponse()
        self._has_items = asyncio.Event()
        self._is_over = False
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._hand_overs: set[asyncio.Task[None]] = set()

    async def messages(self, requests: AsyncIterator[Any]) -> AsyncGenerator[Any, None]:
        """RunResponses to the RunRequests, until those end."""
        reader = asyncio.create_task(self._read(requests))
        try:
            while not self._is_over:
                await self._has_items.wait()
                # Everybody whom the same step woke has left its part by now: they were woken before this was.
                self._has_items.clear()
                message, self._outbox = self._outbox, xllm_pb2.RunResponse()
                if message.outputs or message.failures:
                    yield message
        finally:
            await cancel_all([reader, *self._tasks.values(), *self._hand_overs])

    async def _read(self, requests: AsyncIterator[Any]) -> None:
        try:
            async for request in requests:
                kind = request.WhichOneof("action")
                if kind == "start":
                    self._start(request.start, {"traceparent": request.traceparent, "tracestate": request.tracestate})
                elif kind == "cancel" and request.cancel in self._tasks:
                    self._tasks[request.cancel].cancel()
                elif kind == "hand_over" and request.hand_over.request_id in self._tasks:
                    task = asyncio.create_task(self._hand_over(request.hand_over))
                    self._hand_overs.add(task)
                    task.add_done_callback(self._hand_overs.discard)
        finally:
            self._is_over = True
            self._has_items.set()

    def _start(self, request: Any, trace: Mapping[str, str]) -> None:
        name = request.request_id
        if not name or name in self._tasks:
            message = f"request_id='{name}' must be set, and to one that is not open on this stream."
            self._fail(name, errors.ApiError(errors.ALREADY_EXISTS, message, param="request_id"))
            return
        task = self._tasks[name] = asyncio.create_task(self._run(request, trace))
        task.add_done_callback(lambda _: self._tasks.pop(name, None))

    async def _hand_over(self, message: Any) -> None:
        """Where that is not possible the request goes on here."""
        try:
            target = hand_over_of(message)
            if target is None:
                raise errors.invalid("hand_over must say where to.", param="hand_over")
            await self._engine.hand_over(message.request_id, target)
        except Exception as err:
            logger.warning("request %s stays: %s", message.request_id, to_api_error(err).message)

    async def _run(self, request: Any, trace: Mapping[str, str]) -> None:
        try:
            with self._service.admit("grpc", "xllm.v1.Instance/Run", COMPLETION, trace):
                service = self._service.for_model(request.model)
                prompt = await prompt_of(request, service.tokenizer)
                params = sampling_params_of(request, service, num_prompt=len(prompt))
                outputs = service.generate(
                    request.request_id, prompt, params, resume=resume_of(request), hand_over=hand_over_of(request)
                )
                async with aclosing(outputs):
                    num_tokens = 0
                    async for output in outputs:
                        num_tokens += sum(len(choice.token_ids) for choice in output.outputs)
                        self._put(output, params, num_tokens, len(request.resume.output_token_ids))
        except Exception as err:
            self._fail(request.request_id, to_api_error(err))

    def _put(self, output: RequestOutput, params: SamplingParams, num_tokens: int, num_resumed: int) -> None:
        message = self._outbox.outputs.add(
            request_id=output.request_id, choices=[choice_message(choice) for choice in output.outputs]
        )
        if output.prompt_logprobs is not None:
            message.prompt_logprobs.extend(prompt_logprobs_messages(output.prompt_token_ids, output.prompt_logprobs))
        if output.finished:
            if output.num_kv_tokens is not None:
                message.num_kv_tokens = output.num_kv_tokens
            message.usage.prompt_tokens = len(output.prompt_token_ids)
            message.usage.completion_tokens = num_resumed + num_tokens
            message.usage.cached_tokens = output.num_cached_tokens
            values = response_metrics([output.metrics], num_choices=params.n, num_tokens=num_tokens)
            message.metrics.CopyFrom(metrics_message(values))
        self._has_items.set()

    def _fail(self, request_id: str, error: errors.ApiError) -> None:
        self._outbox.failures.add(
            request_id=request_id,
            status=error.kind.status,
            message=error.message,
            code=error.code,
            param=error.param,
            retry_after_s=error.retry_after_s,
        )
        self._has_items.set()
