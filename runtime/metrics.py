"""What the server measures of itself, for Prometheus.

All of it is observed on the event loop, so the cells need no locks; a scrape turns them into families. (A Histogram of
prometheus-client costs ten times as much an observation, and a request makes a dozen.)
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from time import time

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

from trivium.kernels import kernel_counts

from .bundle import Manifest
from .drift import Drift, drift_families
from .predictor import Prediction, Predictor

# 0.1 ms to 26 s, each twice the one before: a tiny model's request takes 0.3 ms, a ViT's queue seconds
SECONDS = [0.0001 * 2**i for i in range(19)]
# 1 to 1024 pictures
PICTURES = [float(2**i) for i in range(11)]
# nats: 0.002 to 8; the entropy of 1000 equally likely classes is 6.9
ENTROPY = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0]
# nats: 0.0001 to 4; mutual information lies far below the entropy it is part of
INFORMATION = [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.0, 2.0, 4.0]
# nats: 0.0001 to 20; heads of one trunk mostly agree to 0.01, a divergence has no upper bound
DIVERGENCE = [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 20.0]
STAGES = ("decode", "queue", "compute", "route", "total")
MODEL = ("model", "version")


class Distribution:
    """A histogram's cells; a value counts in the first bucket whose upper bound it does not exceed."""

    __slots__ = ("bounds", "counts", "exemplars", "total")

    def __init__(self, bounds: list[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0
        self.exemplars: dict[int, Exemplar] = {}
        """The last traced value of a bucket."""

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def exemplify(self, value: float, trace: str, moment: float) -> None:
        """Keep the trace of an observed value, of a time in seconds since 1970, as its bucket's exemplar."""
        self.exemplars[bisect_left(self.bounds, value)] = Exemplar({"trace_id": trace}, value, moment)

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        """Write the cells, cumulated, as one child of a family."""
        buckets: list[tuple[str, float] | tuple[str, float, Exemplar]] = []
        below = 0
        for index, (bound, count) in enumerate(zip([*self.bounds, float("inf")], self.counts, strict=True)):
            below += count
            name = "+Inf" if bound == float("inf") else repr(bound)
            exemplar = self.exemplars.get(index)
            buckets.append((name, below) if exemplar is None else (name, below, exemplar))
        family.add_metric(labels, buckets, self.total)


class ModelMetrics:
    """One model's cells, which ModelStatistics answers from as well."""

    def __init__(self, predictor: Predictor, drift: Drift | None = None) -> None:
        manifest = predictor.manifest
        self.labels = (manifest.name, manifest.version)
        self.engine = (predictor.engine.kernels, predictor.engine.device)
        self.bundle = predictor.digest
        self.drift = drift
        self.heads = manifest.heads
        self.codes: dict[str, int] = {"OK": 0}
        """Requests by gRPC status code."""
        self.seconds = {stage: Distribution(SECONDS) for stage in STAGES}
        self.pictures = Distribution(PICTURES)
        self.expired = self.rejected = self.cancelled = 0
        self.routed = dict.fromkeys(manifest.heads, 0)
        self.entropy = [Distribution(ENTROPY) for _ in manifest.heads]
        self.information = [Distribution(INFORMATION) for _ in manifest.heads]
        self.divergence = Distribution(DIVERGENCE)
        both = {"clean", "robust"} <= set(manifest.heads)
        self.pair = (manifest.heads.index("clean"), manifest.heads.index("robust")) if both else None
        self.successes = self.failures = self.answered_pictures = 0
        self.sums_ns = dict.fromkeys((*STAGES, "fail"), 0)

    def succeeded(
        self, predictions: Sequence[Prediction], queue_ns: int, total_ns: int, trace: str | None = None
    ) -> None:
        """Count an answered request; `trace` is its trace's id, where it is sampled."""
        decode_ns = compute_ns = route_ns = 0
        for prediction in predictions:
            timings = prediction.timings
            decode_ns += timings.decode
            compute_ns += timings.compute
            route_ns += timings.route
            self._observe(prediction)
        for stage, value in zip(STAGES, (decode_ns, queue_ns, compute_ns, route_ns, total_ns), strict=True):
            self.seconds[stage].observe(value * 1e-9)
            self.sums_ns[stage] += value
            if trace is not None:
                self.seconds[stage].exemplify(value * 1e-9, trace, time())
        self.codes["OK"] += 1
        self.successes += 1
        self.answered_pictures += len(predictions)

    def failed(self, code: str, total_ns: int) -> None:
        """Count a request that was answered with a status other than OK."""
        self.codes[code] = self.codes.get(code, 0) + 1
        self.failures += 1
        self.sums_ns["fail"] += total_ns

    def _observe(self, prediction: Prediction) -> None:
        if self.drift is not None:
            self.drift.add(prediction)
        head = prediction.head
        self.routed[head] = self.routed.get(head, 0) + 1
        for cells, value in zip(self.entropy, prediction.predictive_entropy.tolist(), strict=True):
            cells.observe(value)
        for cells, value in zip(self.information, prediction.mutual_information.tolist(), strict=True):
            cells.observe(value)
        if self.pair is not None:
            self.divergence.observe(float(prediction.divergence[self.pair]))


class Loads:
    """How loading bundles went, counted by model, outcome and the kind of error."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str, str], int] = {}
        self.fallbacks: dict[tuple[str, str], int] = {}

    def count(self, model: str, outcome: str, reason: str = "") -> None:
        """outcome: loaded, refused or unloaded; reason: the error's class where it was refused."""
        key = model, outcome, reason
        self.counts[key] = self.counts.get(key, 0) + 1

    def fall_back(self, model: str, reason: str) -> None:
        """Count a model that another engine runs than the settings ask for."""
        key = model, reason
        self.fallbacks[key] = self.fallbacks.get(key, 0) + 1

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(
            "trivium_loads",
            "Bundles loaded, refused (reason: the kind of error) and unloaded.",
            labels=("model", "outcome", "reason"),
        )
        for key, count in self.counts.items():
            family.add_metric(key, count)
        yield family
        fallbacks = CounterMetricFamily(
            "trivium_engine_fallbacks",
            "Loads after which ONNX Runtime runs a model in TensorRT's place.",
            labels=("model", "reason"),
        )
        for pair, count in self.fallbacks.items():
            fallbacks.add_metric(pair, count)
        yield fallbacks


class Metrics(Collector):
    """Everything one server exposes.

    Args:
        gauges: name -> (help, the value now), read at each scrape.
        executed: pictures taken up by workers since the start.
        drift: makes a model's watch; None where it is not to be watched.
    """

    def __init__(
        self,
        gauges: dict[str, tuple[str, Callable[[], float]]],
        executed: Callable[[], int],
        drift: Callable[[Manifest], Drift | None] = lambda manifest: None,
    ) -> None:
        self.gauges = gauges
        self._executed = executed
        self._drift = drift
        self.loads = Loads()
        self.denied = {"UNAUTHENTICATED": 0, "PERMISSION_DENIED": 0}
        """Calls refused for want of a token or of permission, by status code."""
        self._models: dict[tuple[str, str], ModelMetrics] = {}
        self._unknown: dict[str, int] = {}
        self._release = version("trivium")
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def exposition(self, accept: str = "") -> tuple[str, bytes]:
        """Content type and text of everything: OpenMetrics with exemplars where `accept` names it, else Prometheus'."""
        if "application/openmetrics-text" in accept:
            return openmetrics.CONTENT_TYPE_LATEST, openmetrics.generate_latest(self._registry)  # type: ignore[no-untyped-call]
        return CONTENT_TYPE_LATEST, generate_latest(self._registry)

    def model(self, predictor: Predictor) -> ModelMetrics:
        """The cells of one more model, which are exposed (as zeros) from now on.

        Those of its name, version and heads go on where there are some: a reload is no reason for a counter to restart.
        """
        fresh = ModelMetrics(predictor, self._drift(predictor.manifest))
        known = self._models.get(fresh.labels)
        if known is not None and known.heads == fresh.heads:
            known.engine, known.bundle = fresh.engine, fresh.bundle
            if fresh.drift is not None and known.drift is not None:
                fresh.drift.alarms = known.drift.alarms
            known.drift = fresh.drift
            return known
        self._models[fresh.labels] = fresh
        return fresh

    def forget(self, cells: ModelMetrics) -> None:
        """Expose a model's cells no longer."""
        if self._models.get(cells.labels) is cells:
            del self._models[cells.labels]

    def unknown(self, code: str) -> None:
        """Count a request for a model that is not served; its name is no label, for anybody may invent names."""
        self._unknown[code] = self._unknown.get(code, 0) + 1

    def collect(self) -> Iterator[Metric]:
        """The families, for a registry."""
        requests = CounterMetricFamily(
            "trivium_requests", "Requests answered, by gRPC status code.", labels=(*MODEL, "code")
        )
        for model in self._models.values():
            for code, count in model.codes.items():
                requests.add_metric((*model.labels, code), count)
        for code, count in self._unknown.items():
            requests.add_metric(("", "", code), count)
        yield requests
        yield from self._histograms()
        yield from self._counters()
        watched = [(model.labels, model.drift) for model in self._models.values() if model.drift is not None]
        yield from drift_families(watched)
        yield from self.loads.collect()
        denied = CounterMetricFamily(
            "trivium_denied", "Calls refused for want of a token or of permission.", labels=("code",)
        )
        for code, count in self.denied.items():
            denied.add_metric((code,), count)
        yield denied
        for name, (text, value) in self.gauges.items():
            yield GaugeMetricFamily(name, text, value=value())
        engines = GaugeMetricFamily(
            "trivium_engine_info",
            "1; which implementation of the heads runs, and on what device.",
            labels=(*MODEL, "kernels", "device"),
        )
        for model in self._models.values():
            engines.add_metric((*model.labels, *model.engine), 1)
        yield engines
        bundles = GaugeMetricFamily(
            "trivium_bundle_info",
            "1; which bundle serves: the SHA-256 of its manifest.json, and so of all of it.",
            labels=(*MODEL, "sha256"),
        )
        for model in self._models.values():
            bundles.add_metric((*model.labels, model.bundle), 1)
        yield bundles
        if any("fused" in model.engine for model in self._models.values()):
            yield from _kernel_families()
        build = GaugeMetricFamily("trivium_build_info", "1; the release.", labels=("release",))
        build.add_metric((self._release,), 1)
        yield build

    def _histograms(self) -> Iterator[HistogramMetricFamily]:
        seconds = HistogramMetricFamily(
            "trivium_stage_seconds",
            "Seconds of a successful request in each stage; decode, compute and route are sums over its pictures.",
            labels=(*MODEL, "stage"),
        )
        pictures = HistogramMetricFamily("trivium_request_pictures", "Pictures of a request.", labels=MODEL)
        entropy = HistogramMetricFamily(
            "trivium_predictive_entropy_nats", "Predictive entropy of each head.", labels=(*MODEL, "head")
        )
        information = HistogramMetricFamily(
            "trivium_mutual_information_nats",
            "Mutual information of prediction and dropout mask, of each head.",
            labels=(*MODEL, "head"),
        )
        divergence = HistogramMetricFamily(
            "trivium_divergence_nats",
            "KL divergence of the clean head's prediction from the robust head's.",
            labels=MODEL,
        )
        for model in self._models.values():
            for stage, cells in model.seconds.items():
                cells.add_to(seconds, (*model.labels, stage))
            model.pictures.add_to(pictures, model.labels)
            for head, entropies, informations in zip(model.heads, model.entropy, model.information, strict=True):
                entropies.add_to(entropy, (*model.labels, head))
                informations.add_to(information, (*model.labels, head))
            if model.pair is not None:
                model.divergence.add_to(divergence, model.labels)
        yield from (seconds, pictures, entropy, information, divergence)

    def _counters(self) -> Iterator[CounterMetricFamily]:
        expired = CounterMetricFamily(
            "trivium_expired", "Requests whose deadline passed before their answer.", labels=MODEL
        )
        rejected = CounterMetricFamily(
            "trivium_rejected", "Requests refused because the queue was full.", labels=MODEL
        )  # fmt: skip
        cancelled = CounterMetricFamily("trivium_cancelled", "Requests that their client cancelled.", labels=MODEL)
        routed = CounterMetricFamily(
            "trivium_routed", "Pictures answered, by what the router chose.", labels=(*MODEL, "head")
        )
        for model in self._models.values():
            expired.add_metric(model.labels, model.expired)
            rejected.add_metric(model.labels, model.rejected)
            cancelled.add_metric(model.labels, model.cancelled)
            for head, count in model.routed.items():
                routed.add_metric((*model.labels, head), count)
        yield from (expired, rejected, cancelled, routed)
        yield CounterMetricFamily(
            "trivium_executed_pictures", "Pictures taken up by a worker.", value=self._executed()
        )  # fmt: skip


def _kernel_families() -> Iterator[CounterMetricFamily]:
    done = kernel_counts()
    yield CounterMetricFamily("trivium_kernel_pictures", "Pictures computed by the fused kernel.", value=done.pictures)
    yield CounterMetricFamily(
        "trivium_kernel_poisoned",
        "Pictures that the fused kernel answered with NaN, for features or logits that are not finite.",
        value=done.poisoned,
    )
