"""OpenTelemetry traces: a server span for each request, with the stages' real times as its children.

A request's spans are made when it is over, from times taken on the way, so that one that is not sampled costs no more
than reading its context. W3C Trace Context comes in gRPC's metadata; a parent's decision to sample holds, and requests
without a parent are sampled by ratio. The packages come with the extra `otel`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, NamedTuple

from .errors import MissingExtra

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

METHOD = "inference.GRPCInferenceService/ModelInfer"
SERVER_FAULTS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
"""Status codes that make a server span an error (OpenTelemetry semantic conventions for gRPC)."""
MISSING = "the packages of OpenTelemetry are not installed; run: pip install 'trivium[otel]'"
W3C = ("traceparent", "tracestate")
EXPORT_SECONDS = 5.0
"""Patience with a collector, and with it the longest that a server's end waits for one."""


class Stage(NamedTuple):
    """A child span; times in nanoseconds since 1970."""

    name: str
    start: int
    end: int
    picture: int | None = None
    """Which picture of the request; None where it is of all."""


class Trace(NamedTuple):
    """What names a request's trace."""

    id: str
    """32 hex digits."""
    sampled: bool


class Tracer:
    """Makes spans and has them exported; without `opentelemetry` it cannot be made.

    Args:
        exporter: where spans go, in batches and from a thread of its own.
        ratio: share of requests without a parent that are sampled.

    Raises: MissingExtra.
    """

    def __init__(self, exporter: SpanExporter, ratio: float) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ModuleNotFoundError:
            raise MissingExtra(MISSING) from None
        self._trace = trace
        self._propagator = TraceContextTextMapPropagator()
        self._provider = _provider(ratio)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("trivium", version("trivium"))

    @classmethod
    def to(cls, endpoint: str, ratio: float) -> Tracer:
        """A tracer that exports to an OTLP collector's gRPC, `http://host:port`, or `https://` for TLS.

        Raises: MissingExtra.
        """
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        except ModuleNotFoundError:
            raise MissingExtra(MISSING) from None
        insecure = endpoint.startswith("http://")
        return cls(OTLPSpanExporter(endpoint=endpoint, insecure=insecure, timeout=EXPORT_SECONDS), ratio)

    def record(
        self,
        metadata: Iterable[tuple[str, str | bytes]],
        start: int,
        end: int,
        status: str,
        attributes: Mapping[str, str | int],
        stages: Iterable[Stage],
    ) -> Trace:
        """A request that is over.

        Args:
            metadata: of the call.
            start, end: nanoseconds since 1970.
            status: name of the gRPC status code.
            attributes: of the server span; they and the stages are looked at only where the request is sampled.
        """
        trace = self._trace
        parent = self._propagator.extract({key: value for key, value in metadata if key in W3C})
        span = self._tracer.start_span(METHOD, parent, trace.SpanKind.SERVER, start_time=start)
        context = span.get_span_context()
        if span.is_recording():
            span.set_attributes({"rpc.system.name": "grpc", "rpc.method": METHOD, "rpc.response.status_code": status})
            span.set_attributes(attributes)
            if status in SERVER_FAULTS:
                span.set_attribute("error.type", status)
                span.set_status(trace.StatusCode.ERROR)
            within = trace.set_span_in_context(span, parent)
            for stage in stages:
                known = None if stage.picture is None else {"trivium.picture": stage.picture}
                self._tracer.start_span(stage.name, within, attributes=known, start_time=stage.start).end(stage.end)
        span.end(end)
        return Trace(trace.format_trace_id(context.trace_id), context.trace_flags.sampled)

    def close(self) -> None:
        """Export what is left, for at most EXPORT_SECONDS or so."""
        self._provider.shutdown()


def _provider(ratio: float) -> TracerProvider:
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    ours = Resource.create({"service.name": "trivium", "service.version": version("trivium")})
    # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win
    resource = ours.merge(OTELResourceDetector().detect())
    return TracerProvider(sampler=ParentBased(TraceIdRatioBased(ratio)), resource=resource, shutdown_on_exit=False)
