"""OpenTelemetry traces: one of each request, through all the processes that it passes.

Without --otlp-traces-endpoint no request has a span and OpenTelemetry is not imported. With it spans are sent by a
thread of their own, from a bounded queue: a receiver that is slow or gone costs spans and never a request's time.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from xllm_compile import __version__

logger = logging.getLogger(__name__)

MAX_QUEUED_SPANS = 4096
"""More that wait to be sent push out the oldest."""
EXPORT_TIMEOUT_S = 5.0
PROVIDER = "xllm-compile"

Value = str | bool | int | float | Sequence[str]
Attributes = Mapping[str, Value]
SpanKind = Literal["INTERNAL", "SERVER", "CLIENT"]

_SCHEMES = {"grpc": "http", "http": "http", "grpcs": "https", "https": "https"}
_HTTP_PORT = 4318


class Span:
    """A part of a request that has begun, or none: then nothing here does anything.

    As a context manager it ends where it is left, and says so where that is an error.
    """

    __slots__ = ("_span", "_tracer")

    def __init__(self, tracer: Any = None, span: Any = None) -> None:
        """OpenTelemetry's."""
        self._tracer = tracer
        self._span = span

    def child(
        self,
        name: str,
        attributes: Attributes | None = None,
        *,
        kind: SpanKind = "INTERNAL",
        begin_s: float | None = None,
    ) -> "Span":
        """A part of this, from begin_s (monotonic clock) or from now on."""
        if self._span is None:
            return self
        from opentelemetry import trace

        context = trace.set_span_in_context(self._span)
        start = None if begin_s is None else _epoch_ns(begin_s)
        span = self._tracer.start_span(
            name, context, kind=trace.SpanKind[kind], attributes=attributes, start_time=start
        )
        return Span(self._tracer, span)

    def past(self, name: str, begin_s: float | None, end_s: float | None, attributes: Attributes | None = None) -> None:
        """A part that is over already, on the monotonic clock; none where one of the times is missing."""
        if begin_s is not None and end_s is not None:
            self.child(name, attributes, begin_s=begin_s).end(end_s)

    @property
    def is_recording(self) -> bool:
        """Whether anybody will read what is set here."""
        return self._span is not None and self._span.is_recording()

    @property
    def carrier(self) -> dict[str, str]:
        """W3C traceparent and tracestate, for another process to go on with."""
        found: dict[str, str] = {}
        if self._span is not None:
            from opentelemetry import trace
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            TraceContextTextMapPropagator().inject(found, trace.set_span_in_context(self._span))
        return found

    def set(self, attributes: Attributes) -> None:
        if self._span is not None:
            self._span.set_attributes(attributes)

    def add(self, counts: Mapping[str, int]) -> None:
        """Add to attributes that are counts."""
        if self.is_recording:
            self.set({name: self._span.attributes.get(name, 0) + count for name, count in counts.items()})

    def fail(self, reason: str) -> None:
        if self._span is not None:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_status(Status(StatusCode.ERROR, reason))

    def end(self, end_s: float | None = None) -> None:
        if self._span is not None:
            self._span.end(None if end_s is None else _epoch_ns(end_s))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            self.fail(str(error.__cause__ or error) or type(error).__name__)
        elif error is not None:
            self.set({"xllm.cancelled": True})
        self.end()


NO_SPAN = Span()

_current: ContextVar[Span] = ContextVar("xllm_request_span", default=NO_SPAN)


def current_span() -> Span:
    """That of the request which this task is about."""
    return _current.get()


@dataclass(frozen=True, kw_only=True, slots=True)
class Tracing:
    """Whether and where this process traces requests."""

    has_engine: bool = True
    """It computes. A gateway does not: the times of queue, prefill and decode are in its instances' spans."""
    _tracer: Any = None
    _provider: Any = None
    _exporter: Any = None

    @contextmanager
    def request(self, name: str, carrier: Mapping[str, str], attributes: Attributes | None = None) -> Iterator[Span]:
        """The span of a request that came in, `current_span` while entered. Whether it failed is for the caller to say.

        carrier: the headers it came with, names in lower case; their traceparent says what it is a part of. A bad one
        counts as none.
        """
        if self._tracer is None:
            yield NO_SPAN
            return
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract(carrier)
        started = self._tracer.start_span(name, context, kind=SpanKind.SERVER, attributes=attributes)
        before, span = _current.get(), Span(self._tracer, started)
        _current.set(span)
        try:
            yield span
        finally:
            # Not by a token: a generator that is closed late is closed in another task.
            _current.set(before)
            span.end()

    def close(self) -> None:
        """Send what is left, for EXPORT_TIMEOUT_S or so. What a receiver does not take, that failed before, is lost."""
        if self._exporter is not None:
            self._exporter.hurry()
            self._provider.shutdown()


NO_TRACING = Tracing()


def check_endpoint(endpoint: str) -> str:
    """As OpenTelemetry's exporter takes it. Raises ValueError."""
    url = urlsplit(endpoint)
    try:
        port = url.port
    except ValueError:
        port = None
    if url.scheme not in _SCHEMES or not url.hostname or port is None:
        raise ValueError(
            f"--otlp-traces-endpoint {endpoint} is no address of an OTLP receiver; give grpc://HOST:4317, or"
            " grpcs://HOST:4317 with TLS"
        )
    if port == _HTTP_PORT or url.path.strip("/"):
        raise ValueError(
            f"--otlp-traces-endpoint {endpoint} looks like OTLP over HTTP, and traces are sent over gRPC; give the"
            f" receiver's gRPC port, usually {url.scheme}://{url.hostname}:4317"
        )
    return f"{_SCHEMES[url.scheme]}://{url.netloc}"


def open_tracing(endpoint: str | None, *, service_name: str, instance_name: str, has_engine: bool = True) -> Tracing:
    """Traces to an OTLP receiver, or none at all. OpenTelemetry's OTEL_* variables hold: headers, sampler, resource.

    Nobody has to listen there yet. Raises ValueError for a bad endpoint, or where the packages are missing.
    """
    if endpoint is None:
        return NO_TRACING
    address = check_endpoint(endpoint)
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as err:
        raise ValueError(
            f"--otlp-traces-endpoint needs OpenTelemetry, and {err.name} is not installed; run pip install"
            " 'xllm-compile[otel]'"
        ) from err
    resource = Resource(
        {
            "service.name": service_name,
            "service.version": __version__,
            "service.namespace": PROVIDER,
            "service.instance.id": instance_name,
        }
    ).merge(OTELResourceDetector().detect())
    exporter = _Exporter(OTLPSpanExporter(endpoint=address, timeout=EXPORT_TIMEOUT_S), endpoint)
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=MAX_QUEUED_SPANS))  # type: ignore[arg-type, unused-ignore]
    tracer = provider.get_tracer("xllm_compile", __version__)
    return Tracing(has_engine=has_engine, _tracer=tracer, _provider=provider, _exporter=exporter)


class _Exporter:
    """OpenTelemetry's exporter, which would log every try. Here a receiver that is gone is said once."""

    def __init__(self, exporter: Any, endpoint: str) -> None:
        self._inner = exporter
        self._endpoint = endpoint
        self._last_words = _LastWords()
        self._is_failing = self._is_closing = False

    def export(self, spans: Sequence[Any]) -> Any:
        from opentelemetry.sdk.trace.export import SpanExportResult

        if self._is_closing and self._is_failing:
            return SpanExportResult.FAILURE
        result = self._inner.export(spans)
        has_failed = result is not SpanExportResult.SUCCESS
        if has_failed and not self._is_failing:
            logger.warning("traces are lost: %s takes none: %s", self._endpoint, self._last_words.text)
        elif self._is_failing and not has_failed:
            logger.info("traces arrive at %s again", self._endpoint)
        self._is_failing = has_failed
        return result

    def hurry(self) -> None:
        """The process is about to end."""
        self._is_closing = True
        if self._is_failing:
            self._inner.shutdown()

    def shutdown(self) -> None:
        self._inner.shutdown()
        self._last_words.close()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return True


class _LastWords(logging.Handler):
    """The last of what OpenTelemetry logged, which goes nowhere else while this is open."""

    def __init__(self) -> None:
        super().__init__()
        self.text = "no answer"
        self._logger = logging.getLogger("opentelemetry")
        self._logger.propagate = False
        self._logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage()

    def close(self) -> None:
        self._logger.removeHandler(self)
        self._logger.propagate = True
        super().close()


def _epoch_ns(monotonic_s: float) -> int:
    return time.time_ns() - time.monotonic_ns() + round(monotonic_s * 1e9)
