"""An OTLP receiver over real gRPC that keeps the spans it gets. Import it behind pytest.importorskip."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SpanMessage
from opentelemetry.proto.trace.v1.trace_pb2 import Status


@dataclass(frozen=True, kw_only=True)
class ReceivedSpan:
    name: str
    kind: str
    service: str
    instance: str
    trace_id: str
    span_id: str
    parent_id: str
    """Empty for a root."""
    begin_ns: int
    end_ns: int
    is_error: bool
    attributes: dict[str, Any]


@dataclass
class Receiver:
    endpoint: str = ""
    spans: list[ReceivedSpan] = field(default_factory=list)

    def named(self, name: str, service: str | None = None) -> list[ReceivedSpan]:
        return [each for each in self.spans if each.name == name and service in (None, each.service)]

    def one(self, name: str, service: str | None = None) -> ReceivedSpan:
        (found,) = self.named(name, service)
        return found

    def children(self, parent: ReceivedSpan) -> dict[str, ReceivedSpan]:
        return {each.name: each for each in self.spans if each.parent_id == parent.span_id}


class _Servicer(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc, unused-ignore]
    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver

    def Export(self, request: Any, context: Any) -> Any:
        for of_resource in request.resource_spans:
            resource = _attributes(of_resource.resource)
            for of_scope in of_resource.scope_spans:
                self._receiver.spans.extend(_received(span, resource) for span in of_scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()


@contextmanager
def otlp_receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    server = grpc.server(ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(_Servicer(receiver), server)
    receiver.endpoint = f"grpc://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield receiver
    server.stop(None).wait()


def _received(span: Any, resource: dict[str, Any]) -> ReceivedSpan:
    return ReceivedSpan(
        name=span.name,
        kind=SpanMessage.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        service=resource["service.name"],
        instance=resource["service.instance.id"],
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        begin_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        is_error=span.status.code == Status.STATUS_CODE_ERROR,
        attributes=_attributes(span),
    )


def _attributes(owner: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in owner.attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind)
