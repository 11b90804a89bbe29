"""OpenTelemetry traces: a server span for each request, with the stages' real times as its children.

A request's spans are made when it is over, from times taken on the way, so that one that is not sampled costs no more
than reading its context. W3C Trace Context comes in gRPC's metadata; a parent's decision to sample holds, and requests
without a parent are sampled by ratio. The packages come with the extra `otel`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, NamedTuple

from .errors import MissingExtra

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import SpanContext, TraceState

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
            from opentelemetry.sdk.trace import ReadableSpan
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
            from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
            from opentelemetry.sdk.util.instrumentation import InstrumentationScope
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ModuleNotFoundError:
            raise MissingExtra(MISSING) from None
        self._trace = trace
        self._propagator = TraceContextTextMapPropagator()
        self._sampler = ParentBased(TraceIdRatioBased(ratio))
        self._ids = RandomIdGenerator()
        self._processor = BatchSpanProcessor(exporter)
        # a live span, started, given attributes and ended, would cost ten times as much
        self._span = partial(
            ReadableSpan,
            resource=_resource(),
            instrumentation_scope=InstrumentationScope("trivium", version("trivium")),
        )

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
        context = self._propagator.extract({key: value for key, value in metadata if key in W3C})
        parent = self._trace.get_current_span(context).get_span_context()
        trace_id = parent.trace_id if parent.is_valid else self._ids.generate_trace_id()
        sampling = self._sampler.should_sample(context, trace_id, METHOD)
        sampled = sampling.decision.is_sampled()  # type: ignore[no-untyped-call]
        if sampled:
            own = self._context(trace_id, sampling.trace_state)
            known = {"rpc.system.name": "grpc", "rpc.method": METHOD, "rpc.response.status_code": status, **attributes}
            fault = status in SERVER_FAULTS
            if fault:
                known["error.type"] = status
            self._processor.on_end(
                self._span(
                    METHOD,
                    own,
                    parent if parent.is_valid else None,
                    attributes=known,
                    kind=self._trace.SpanKind.SERVER,
                    status=self._trace.Status(self._trace.StatusCode.ERROR if fault else self._trace.StatusCode.UNSET),
                    start_time=start,
                    end_time=end,
                )
            )
            for stage in stages:
                picture = {} if stage.picture is None else {"trivium.picture": stage.picture}
                within = self._context(trace_id, sampling.trace_state)
                self._processor.on_end(
                    self._span(stage.name, within, own, attributes=picture, start_time=stage.start, end_time=stage.end)
                )
        return Trace(self._trace.format_trace_id(trace_id), sampled)

    def close(self) -> None:
        """Export what is left, for at most EXPORT_SECONDS or so."""
        self._processor.shutdown()  # type: ignore[no-untyped-call]

    def _context(self, trace_id: int, state: TraceState | None) -> SpanContext:
        """Of a new span that is sampled."""
        flags = self._trace.TraceFlags(self._trace.TraceFlags.SAMPLED)
        return self._trace.SpanContext(trace_id, self._ids.generate_span_id(), False, flags, state)


def _resource() -> Resource:
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource

    ours = Resource.create({"service.name": "trivium", "service.version": version("trivium")})
    # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win
    return ours.merge(OTELResourceDetector().detect())
