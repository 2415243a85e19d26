"""What HTTP and gRPC share: the engine, who may use it, and how many at once."""

import asyncio
import contextlib
import hmac
import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence

from xllm_compile.runtime.hand_over import HandOver
from xllm_compile.runtime.outputs import RequestOutput
from xllm_compile.runtime.resume import Resume
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.scheduler import errors
from xllm_compile.scheduler.chat_formats import ChatFormats
from xllm_compile.scheduler.engine_client import EngineClient, ServiceTokenizer
from xllm_compile.scheduler.engine_errors import to_api_error
from xllm_compile.scheduler.limits import StreamLimiter
from xllm_compile.scheduler.metrics import ServiceMetrics, render
from xllm_compile.scheduler.model_waker import ModelWaker
from xllm_compile.scheduler.recent_latency import RecentLatency
from xllm_compile.scheduler.request_trace import operation, trace_generation
from xllm_compile.scheduler.tracing import NO_TRACING, Tracing, current_span

logger = logging.getLogger(__name__)


class ClientGoneError(Exception):
    """The client closed the connection; nobody is left to answer. Caught where the request came in."""


class Service:
    """One served model. Lives on one event loop; owns nothing of the engine.

    Where a process has several, the first one's service is the door for all: requests are admitted there, and find
    their model's by name.
    """

    def __init__(
        self,
        *,
        engine: EngineClient,
        tokenizer: ServiceTokenizer,
        model_names: Sequence[str],
        max_model_len: int,
        version: str,
        api_keys: Sequence[str] = (),
        max_streams: int = 1024,
        max_body_bytes: int = 8 << 20,
        chat_formats: ChatFormats | None = None,
        unhealthy: Callable[[], errors.ApiError] = errors.engine_stopped,
        longest_now: Callable[[], int | None] = lambda: None,
        door: "Service | None" = None,
        waker: ModelWaker | None = None,
        tracing: Tracing = NO_TRACING,
    ) -> None:
        """unhealthy says what is the matter while the engine is not healthy. longest_now: of an engine that has its
        instances elsewhere, what they take, which may be less than max_model_len; None where nobody knows.

        door is the process's first service, if this is another one: its limits, key and metrics count. waker wakes the
        model for its requests. Raises ValueError when another model has one of the names.
        """
        self.models: dict[str, Service] = door.models if door else {}
        """Every model of the process under each of its names."""
        for name in model_names:
            if name in self.models:
                raise ValueError(f"two models are served as {name!r}; give each a name of its own")
            self.models[name] = self
        self.engine = engine
        self.tokenizer = tokenizer
        self.model_names = tuple(model_names)
        self._max_model_len, self._longest_now = max_model_len, longest_now
        self.version = version
        self.max_body_bytes = max_body_bytes
        self.chat_formats = chat_formats or ChatFormats.choose(tokenizer.chat_template_text)
        self.unhealthy = unhealthy
        self.limiter: StreamLimiter = door.limiter if door else StreamLimiter(max_streams)
        self.metrics = ServiceMetrics(engine.stats, self.limiter)
        self.latency = RecentLatency()
        self.tracing = tracing
        self.is_draining = False
        self._waker = waker
        self._open_ids: set[str] = set()
        self._api_keys = tuple(key.encode() for key in api_keys)

    @property
    def model_name(self) -> str:
        """The name answers carry."""
        return self.model_names[0]

    @property
    def max_model_len(self) -> int:
        """Prompt and output together, in tokens."""
        return min(self._max_model_len, self._longest_now() or self._max_model_len)

    @property
    def services(self) -> list["Service"]:
        """One for each model of the process."""
        return list(dict.fromkeys(self.models.values()))

    @property
    def is_ready(self) -> bool:
        return self.is_healthy and not self.is_draining

    @property
    def is_healthy(self) -> bool:
        return all(service.engine.is_healthy for service in self.services)

    def is_authorized(self, authorization: bytes | None) -> bool:
        """authorization is the whole header, "Bearer <key>"."""
        if not self._api_keys:
            return True
        scheme, _, key = (authorization or b"").partition(b" ")
        # All are compared, so that the time tells nothing.
        matches = [hmac.compare_digest(key.strip(), known) for known in self._api_keys]
        return scheme.lower() == b"bearer" and any(matches)

    def for_model(self, name: str | None) -> "Service":
        """The model of that name; the first one where none is asked for. Raises ApiError (404)."""
        if not name:
            return self
        if name not in self.models:
            raise errors.model_not_found(name, "', '".join(self.models))
        return self.models[name]

    def render_metrics(self) -> bytes:
        """What /metrics answers."""
        return render({service.model_name: service.metrics for service in self.services})

    @contextlib.contextmanager
    def admit(self, api: str, name: str, does: str, headers: Mapping[str, str]) -> Iterator[None]:
        """Hold a stream for one request and count how it ends. Raises ApiError (429, 503) when there is none.

        Where requests are traced, name is its span's, does what it asks for (request_trace.py) and headers what it
        came with.
        """
        with self.tracing.request(name, headers, operation(does)) as span:
            outcome = "ok"
            try:
                if self.is_draining:
                    raise errors.draining()
                with self.limiter.slot():
                    yield
            except errors.ApiError as err:
                outcome = "error" if err.kind is errors.INTERNAL else "refused"
                raise
            except (ClientGoneError, asyncio.CancelledError, GeneratorExit):
                outcome = "abort"
                raise
            except BaseException:
                outcome = "error"
                raise
            finally:
                self.metrics.count_request(api, outcome)
                span.set({"xllm.outcome": outcome})
                if outcome == "error":
                    span.fail("the server failed")

    async def generate(
        self,
        request_id: str,
        token_ids: list[int],
        params: SamplingParams,
        *,
        resume: Resume | None = None,
        hand_over: HandOver | None = None,
        is_measured: bool = True,
    ) -> AsyncGenerator[RequestOutput, None]:
        """The engine's outputs of one prompt. Raises ApiError whatever the engine raised.

        resume: what the request has generated elsewhere. hand_over: where its KV goes with its next token.
        is_measured: it counts in /metrics, as what a client asked for and no part of it.
        """
        if request_id in self._open_ids:
            message = f"A request of id '{request_id}' is open; choose another."
            raise errors.ApiError(errors.ALREADY_EXISTS, message, param="request_id", code="request_id_in_use")
        self._open_ids.add(request_id)
        num_tokens, last_s = 0, None
        span = current_span()
        output: RequestOutput | None = None
        outputs = self.engine.generate(request_id, token_ids, params, resume=resume, hand_over=hand_over)
        try:
            async with self._waker.awake(self.model_name) if self._waker else contextlib.nullcontext():
                async for output in outputs:
                    num_new = 0
                    for choice in output.outputs:
                        num_new += len(choice.token_ids)
                        if choice.finish_reason is not None and is_measured:
                            self.metrics.count_finished(choice.finish_reason)
                    num_tokens += num_new
                    last_s = self.latency.observe(output, last_s, num_new)
                    if output.finished and is_measured:
                        self.metrics.observe(output.metrics, num_tokens // params.n)
                    yield output
        except Exception as err:
            error = to_api_error(err)
            if error.code == "internal_error":
                logger.exception("request %s failed", request_id)
            raise error from err
        finally:
            # An abandoned iterator aborts its request only when closed, and the collector closes it late.
            close = getattr(outputs, "aclose", None)
            if close is not None:
                await close()
            if output is not None and span.is_recording:
                has_engine = self.tracing.has_engine
                trace_generation(span, self.model_name, params, output, num_tokens, has_engine=has_engine)
            self._open_ids.discard(request_id)

    async def abort(self, request_id: str) -> bool:
        """End an open request of any model, all prompts of it. False when there is none of that id."""
        was_open = False
        for service in self.services:
            for name in [name for name in service._open_ids if request_id in (name, name.rpartition("-")[0])]:
                await service.engine.abort(name)
                was_open = True
        return was_open
