"""What is told of each request beyond counting it: a line of the access log, a trace."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from time import perf_counter_ns, time_ns
from typing import Any

from .bundle import Manifest
from .config import Settings
from .logs import Value, about, request_id
from .predictor import Prediction
from .scheduler import Job
from .tracing import Stage, Trace, Tracer

TRACED_PICTURES = 16
"""Of a request, how many pictures have spans of their own."""
_log = logging.getLogger("trivium.access")


class Journal:
    """Args: access_log asks for a line a request; tracer for traces."""

    def __init__(self, access_log: bool, tracer: Tracer | None) -> None:
        self._access_log = access_log
        self._tracer = tracer

    @classmethod
    def of(cls, settings: Settings) -> Journal | None:
        """None where neither log nor traces are asked for, so that a server need not ask again.

        Raises: MissingExtra.
        """
        tracer = None
        if settings.trace_endpoint is not None:
            tracer = Tracer.to(settings.trace_endpoint, settings.trace_ratio)
        return cls(settings.access_log, tracer) if settings.access_log or tracer is not None else None

    def starts(self, pictures: int) -> list[int] | None:
        """Where to note when each picture was taken up, in perf_counter_ns; None where nobody wants to know."""
        return None if self._tracer is None else [0] * pictures

    def answered(
        self,
        request: Any,
        context: Any,
        manifest: Manifest,
        job: Job[Prediction],
        predictions: Sequence[Prediction],
        starts: list[int] | None,
        start: int,
        end: int,
    ) -> str | None:
        """An answered request, `start` to `end` in perf_counter_ns; its trace's id where it is sampled."""
        heads = ",".join(dict.fromkeys(prediction.head for prediction in predictions))
        trace: Trace | None = None
        if self._tracer is not None and starts is not None:
            shift = time_ns() - perf_counter_ns()
            attributes: dict[str, str | int] = {
                "trivium.model.name": manifest.name,
                "trivium.model.version": manifest.version,
                "trivium.pictures": len(predictions),
                "trivium.head": heads,
            }
            stages = _stages(job, predictions, starts, shift)
            metadata = context.invocation_metadata() or ()
            trace = self._tracer.record(metadata, start + shift, end + shift, "OK", attributes, stages)
        if self._access_log:
            timings = [prediction.timings for prediction in predictions]
            _log.info(
                "answered",
                extra=about(
                    status="OK",
                    request_id=request_id(request),
                    model=manifest.name,
                    version=manifest.version,
                    pictures=len(predictions),
                    head=heads,
                    **_answers(manifest, job, predictions),
                    decode_ms=sum(one.decode for one in timings) / 1e6,
                    queue_ms=job.queue_ns / 1e6,
                    compute_ms=sum(one.compute for one in timings) / 1e6,
                    route_ms=sum(one.route for one in timings) / 1e6,
                    total_ms=(end - start) / 1e6,
                    peer=context.peer(),
                    trace_id=trace.id if trace is not None else None,
                ),
            )
        return trace.id if trace is not None and trace.sampled else None

    def failed(
        self, request: Any, context: Any, manifest: Manifest | None, status: str, reason: str, start: int, end: int
    ) -> str | None:
        """A request that ended with a status other than OK; its trace's id.

        Args:
            manifest: None where the model is not known.
            reason: what the client is told.
        """
        model = manifest.name if manifest is not None else request.model_name[:200]
        version = manifest.version if manifest is not None else request.model_version[:40]
        trace: Trace | None = None
        if self._tracer is not None:
            shift = time_ns() - perf_counter_ns()
            attributes = {"trivium.model.name": model, "trivium.model.version": version}
            metadata = context.invocation_metadata() or ()
            trace = self._tracer.record(metadata, start + shift, end + shift, status, attributes, ())
        if self._access_log:
            _log.info(
                "refused",
                extra=about(
                    status=status,
                    request_id=request_id(request),
                    model=model,
                    version=version,
                    total_ms=(end - start) / 1e6,
                    peer=context.peer(),
                    reason=reason,
                    trace_id=trace.id if trace is not None else None,
                ),
            )
        return trace.id if trace is not None else None

    def close(self) -> None:
        """Hand on what is left; may take seconds."""
        if self._tracer is not None:
            self._tracer.close()


def _answers(manifest: Manifest, job: Job[Prediction], predictions: Sequence[Prediction]) -> dict[str, Value | None]:
    """What was answered, and on what terms, for `trivium feedback`; of each picture one element of a list."""
    asked = job.payload.request
    fields: dict[str, Value | None] = {
        "router": asked.router or manifest.router.default,
        "class_id": [one.class_id for one in predictions],
    }
    if (terms := asked.terms) is None:
        return fields
    if "prediction_set" in terms.outputs:
        sets = [one.prediction_set for one in predictions if one.prediction_set is not None]
        fields |= {"coverage": terms.coverage, "prediction_set": [one.nonzero()[0].tolist() for one in sets]}
    if "abstain" in terms.outputs:
        fields |= {"max_risk": terms.max_risk, "abstain": [one.abstain for one in predictions]}
    if "shift_score" in terms.outputs:
        fields["shift_score"] = [round(one.shift_score, 4) for one in predictions if one.shift_score is not None]
    return fields


def _stages(job: Job[Prediction], predictions: Sequence[Prediction], starts: list[int], shift: int) -> Iterator[Stage]:
    entered = job.entered_ns + shift
    yield Stage("queue", entered, entered + job.queue_ns)
    for picture, (prediction, start) in enumerate(zip(predictions[:TRACED_PICTURES], starts, strict=False)):
        timings = prediction.timings
        at = start + shift
        for name, length in (("decode", timings.decode), ("compute", timings.compute), ("route", timings.route)):
            if length:
                yield Stage(name, at, at + length, picture)
                at += length
