"""The gRPC API (proto/xllm.proto): the Inference service, health, reflection and the API key."""

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from xllm_compile.scheduler.embedding import embed
from xllm_compile.scheduler.grpc_convert import (
    choice_message,
    embedding_params_of,
    hand_over_of,
    metrics_message,
    prompt_logprobs_messages,
    prompt_of,
    resume_of,
    sampling_params_of,
    usage_message,
)
from xllm_compile.scheduler.grpc_errors import abort_call
from xllm_compile.scheduler.instance_api import InstanceServicer, metadata_of
from xllm_compile.scheduler.output_stream import OutputStream
from xllm_compile.scheduler.proto import xllm_pb2, xllm_pb2_grpc
from xllm_compile.scheduler.request_trace import COMPLETION, EMBEDDINGS
from xllm_compile.scheduler.service import Service

SERVICE_NAME: str = xllm_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
INSTANCE_SERVICE_NAME: str = xllm_pb2.DESCRIPTOR.services_by_name["Instance"].full_name
MAX_SEND_BYTES = 64 << 20
_GENERATE, _EMBED = f"{SERVICE_NAME}/Generate", f"{SERVICE_NAME}/Embed"

_KEEPALIVE = (
    # The calls of a peer that vanished without a word end: nobody reads what they compute.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Gateways look after their connections in the same way (cluster/instance_link.py).
    ("grpc.http2.min_ping_interval_without_data_ms", 200),
    ("grpc.http2.max_pings_without_data", 0),
)

# A health probe has no key to send, and learns nothing but up or down.
_OPEN_METHODS = f"/{health.SERVICE_NAME}/"


class InferenceServicer:
    """Methods carry the names of the proto."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            with self._service.admit("grpc", _GENERATE, COMPLETION, metadata_of(context)):
                async for response in self._generate(request):
                    yield response
        except Exception as err:
            await abort_call(context, err)

    async def _generate(self, request: Any) -> AsyncIterator[Any]:
        service = self._service.for_model(request.model)
        prompt = await prompt_of(request, service.tokenizer)
        params = sampling_params_of(request, service, num_prompt=len(prompt))
        request_id = request.request_id or f"grpc-{uuid.uuid4().hex}"
        iterator = service.generate(
            request_id, prompt, params, resume=resume_of(request), hand_over=hand_over_of(request)
        )
        async with OutputStream([iterator], params.n, abort_is_error=False) as outputs:
            if request.final_only:
                choices = [choice_message(choice) for choice in await outputs.collect()]
                yield _last_response(request, request_id, prompt, outputs, choices)
                return
            async for moved in outputs:
                choices = [choice_message(choice) for choice in moved]
                yield xllm_pb2.GenerateResponse(request_id=request_id, choices=choices)
            yield _last_response(request, request_id, prompt, outputs, [])

    async def Embed(self, request: Any, context: Any) -> Any:
        try:
            with self._service.admit("grpc", _EMBED, EMBEDDINGS, metadata_of(context)):
                return await self._embed(request)
        except Exception as err:
            return await abort_call(context, err)

    async def _embed(self, request: Any) -> Any:
        service = self._service.for_model(request.model)
        params = embedding_params_of(request)
        prompt = await prompt_of(request, service.tokenizer)
        values = await embed(service, request.request_id or f"grpc-{uuid.uuid4().hex}", prompt, params)
        return xllm_pb2.EmbedResponse(embedding=values.tolist(), usage=xllm_pb2.Usage(prompt_tokens=len(prompt)))

    async def Abort(self, request: Any, context: Any) -> Any:
        return xllm_pb2.AbortResponse(was_open=await self._service.abort(request.request_id))

    async def GetServerInfo(self, request: Any, context: Any) -> Any:
        service = self._service
        stats = [each.engine.stats() for each in service.services]
        return xllm_pb2.GetServerInfoResponse(
            version=service.version,
            model_names=service.models,
            max_model_len=service.max_model_len,
            is_draining=service.is_draining,
            num_running=sum(each.num_running for each in stats),
            num_waiting=sum(each.num_waiting for each in stats),
            kv_tokens_used=sum(each.kv_tokens_used for each in stats),
            kv_tokens_total=sum(each.kv_tokens_total for each in stats),
        )


def _last_response(request: Any, request_id: str, prompt: list[int], outputs: OutputStream, choices: list[Any]) -> Any:
    return xllm_pb2.GenerateResponse(
        request_id=request_id,
        choices=choices,
        prompt_logprobs=prompt_logprobs_messages(prompt, outputs.prompt_logprobs[0] or ()),
        usage=usage_message(len(prompt), len(request.resume.output_token_ids), outputs),
        metrics=metrics_message(outputs.metrics) if request.include_metrics else None,
        num_kv_tokens=outputs.num_kv_tokens,
    )


class _KeyCheck(grpc.aio.ServerInterceptor):  # type: ignore[misc, unused-ignore]
    """Asks for `authorization: Bearer <key>` on everything but the health check."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        key = dict(details.invocation_metadata).get("authorization")
        if details.method.startswith(_OPEN_METHODS) or self._service.is_authorized(key.encode() if key else None):
            return await continuation(details)
        return grpc.unary_unary_rpc_method_handler(_refuse_key)


async def _refuse_key(request: Any, context: Any) -> None:
    message = "Incorrect API key provided; send metadata 'authorization: Bearer <key>'."
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, message)


class GrpcServer:
    """Bind, start, announce draining, stop."""

    def __init__(self, service: Service) -> None:
        self._names = [SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME]
        self._server = grpc.aio.server(
            interceptors=(_KeyCheck(service),),
            options=(
                ("grpc.max_receive_message_length", service.max_body_bytes),
                ("grpc.max_send_message_length", MAX_SEND_BYTES),
                # A second server on the same port must fail, not take half of the calls.
                ("grpc.so_reuseport", 0),
                *_KEEPALIVE,
            ),
        )
        xllm_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(service), self._server)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    def bind(self, host: str, port: int, credentials: grpc.ServerCredentials | None = None) -> int:
        """The real port, with TLS where there are credentials. Raises OSError when it is taken."""
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if credentials is not None:
                return int(self._server.add_secure_port(address, credentials))
            return int(self._server.add_insecure_port(address))
        except RuntimeError as err:
            raise OSError(f"gRPC cannot listen on {address}: {err}") from err

    def add_instance(self, instance: InstanceServicer) -> None:
        """Serve Instance as well: this is one among others. Before `start`."""
        xllm_pb2_grpc.add_InstanceServicer_to_server(instance, self._server)
        self._names.append(INSTANCE_SERVICE_NAME)

    async def start(self) -> None:
        reflection.enable_server_reflection(self._names, self._server)
        await self._server.start()
        for name in ("", SERVICE_NAME):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def announce_draining(self) -> None:
        """Health answers NOT_SERVING from here on; open calls go on."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace_s: float) -> None:
        await self._server.stop(grace_s)
