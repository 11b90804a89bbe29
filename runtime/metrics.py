"""What the server measures of itself, for Prometheus; all observed on the event loop, label children resolved once."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from .predictor import Prediction, Predictor
from .scheduler import Scheduler

# 0.1 ms to 26 s, each twice the one before: a tiny model's request takes 0.3 ms, a ViT's queue seconds
SECONDS = [0.0001 * 2**i for i in range(19)]
# 1 to 1024 pictures
PICTURES = [2**i for i in range(11)]
# nats: 0.002 to 8; the entropy of 1000 equally likely classes is 6.9
ENTROPY = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0]
# nats: 0.0001 to 4; mutual information lies far below the entropy it is part of
INFORMATION = [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.0, 2.0, 4.0]
# nats: 0.0001 to 20; heads of one trunk mostly agree to 0.01, a divergence has no upper bound
DIVERGENCE = [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 20.0]
STAGES = ("decode", "queue", "compute", "route", "total")


class Metrics:
    """The registry of one server."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        model = ["model", "version"]
        self.requests = Counter(
            "trivium_requests", "Requests answered, by gRPC status code.", [*model, "code"], registry=registry
        )
        self.seconds = Histogram(
            "trivium_stage_seconds",
            "Seconds of a successful request in each stage; decode, compute and route are sums over its pictures.",
            [*model, "stage"],
            buckets=SECONDS,
            registry=registry,
        )
        self.pictures = Histogram(
            "trivium_request_pictures", "Pictures of a request.", model, buckets=PICTURES, registry=registry
        )
        self.expired = Counter(
            "trivium_expired", "Requests whose deadline passed before their answer.", model, registry=registry
        )
        self.rejected = Counter(
            "trivium_rejected", "Requests refused because the queue was full.", model, registry=registry
        )
        self.cancelled = Counter("trivium_cancelled", "Requests that their client cancelled.", model, registry=registry)
        self.routed = Counter(
            "trivium_routed", "Pictures answered, by what the router chose.", [*model, "head"], registry=registry
        )
        self.entropy = Histogram(
            "trivium_predictive_entropy_nats",
            "Predictive entropy of each head.",
            [*model, "head"],
            buckets=ENTROPY,
            registry=registry,
        )
        self.information = Histogram(
            "trivium_mutual_information_nats",
            "Mutual information of prediction and dropout mask, of each head.",
            [*model, "head"],
            buckets=INFORMATION,
            registry=registry,
        )
        self.divergence = Histogram(
            "trivium_divergence_nats",
            "KL divergence of the clean head's prediction from the robust head's.",
            model,
            buckets=DIVERGENCE,
            registry=registry,
        )
        self.engines = Gauge(
            "trivium_engine_info",
            "1; which implementation of the heads runs, and on what device.",
            [*model, "kernels", "device"],
            registry=registry,
        )
        self.in_flight = Gauge("trivium_in_flight_requests", "Requests not yet answered.", registry=registry)
        self.ready = Gauge("trivium_ready", "1 while the server takes requests.", registry=registry)
        Gauge("trivium_queue_depth", "Pictures waiting.", registry=registry).set_function(lambda: scheduler.depth)
        Gauge("trivium_running_pictures", "Pictures being answered.", registry=registry).set_function(
            lambda: scheduler.running
        )
        Gauge("trivium_held_bytes", "Bytes of requests waiting or running.", registry=registry).set_function(
            lambda: scheduler.nbytes
        )
        Gauge("trivium_instances", "Worker threads.", registry=registry).set(scheduler.instances)
        self.executed = Counter("trivium_executed_pictures", "Pictures taken up by a worker.", registry=registry)
        self._scheduler = scheduler
        self._executed = 0
        info = Gauge("trivium_build_info", "1; the release.", ["release"], registry=registry)
        info.labels(version("trivium")).set(1)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        executed = self._scheduler.executed
        self.executed.inc(executed - self._executed)
        self._executed = executed
        return generate_latest(self.registry)

    def model(self, predictor: Predictor) -> ModelMetrics:
        """The metrics of one model, which exist (as zeros) from now on."""
        return ModelMetrics(self, predictor)

    def unknown(self, code: str) -> None:
        """Count a request for a model that is not served; its name is no label, for anybody may invent names."""
        self.requests.labels("", "", code).inc()


class ModelMetrics:
    """One model's label children, and the sums that ModelStatistics answers with."""

    def __init__(self, metrics: Metrics, predictor: Predictor) -> None:
        manifest = predictor.manifest
        self._labels = (manifest.name, manifest.version)
        self._requests = metrics.requests
        self._codes = {"OK": metrics.requests.labels(*self._labels, "OK")}
        self.pictures = metrics.pictures.labels(*self._labels)
        self._stages = [metrics.seconds.labels(*self._labels, stage) for stage in STAGES]
        self.expired = metrics.expired.labels(*self._labels)
        self.rejected = metrics.rejected.labels(*self._labels)
        self.cancelled = metrics.cancelled.labels(*self._labels)
        self._routed = {head: metrics.routed.labels(*self._labels, head) for head in manifest.heads}
        self._routed_family = metrics.routed
        self._entropy = [metrics.entropy.labels(*self._labels, head) for head in manifest.heads]
        self._information = [metrics.information.labels(*self._labels, head) for head in manifest.heads]
        self._pair = None
        if {"clean", "robust"} <= set(manifest.heads):
            self._pair = manifest.heads.index("clean"), manifest.heads.index("robust")
            self._divergence = metrics.divergence.labels(*self._labels)
        metrics.engines.labels(*self._labels, predictor.engine.kernels, predictor.engine.device).set(1)
        self.successes = self.failures = self.answered_pictures = 0
        self.sums_ns = dict.fromkeys((*STAGES, "fail"), 0)

    def succeeded(self, predictions: Sequence[Prediction], queue_ns: int, total_ns: int) -> None:
        """Count an answered request."""
        timings = [prediction.timings for prediction in predictions]
        nanoseconds = (
            sum(t.decode for t in timings),
            queue_ns,
            sum(t.compute for t in timings),
            sum(t.route for t in timings),
            total_ns,
        )
        for name, stage, value in zip(STAGES, self._stages, nanoseconds, strict=True):
            stage.observe(value * 1e-9)
            self.sums_ns[name] += value
        self._codes["OK"].inc()
        self.successes += 1
        self.answered_pictures += len(predictions)
        for prediction in predictions:
            self._observe(prediction)

    def failed(self, code: str, total_ns: int) -> None:
        """Count a request that was answered with a status other than OK."""
        if code not in self._codes:
            self._codes[code] = self._requests.labels(*self._labels, code)
        self._codes[code].inc()
        self.failures += 1
        self.sums_ns["fail"] += total_ns

    def _observe(self, prediction: Prediction) -> None:
        head = prediction.head
        if head not in self._routed:
            self._routed[head] = self._routed_family.labels(*self._labels, head)
        self._routed[head].inc()
        for histogram, value in zip(self._entropy, prediction.predictive_entropy.tolist(), strict=True):
            histogram.observe(value)
        for histogram, value in zip(self._information, prediction.mutual_information.tolist(), strict=True):
            histogram.observe(value)
        if self._pair is not None:
            self._divergence.observe(float(prediction.divergence[self._pair]))
