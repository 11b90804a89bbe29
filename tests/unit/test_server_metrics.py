"""The server's cells and their exposition, read back with Prometheus' own parser."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

from trivium.kernels import mc_heads
from trivium.runtime.metrics import DIVERGENCE, ENTROPY, INFORMATION, PICTURES, SECONDS, Distribution, Metrics
from trivium.runtime.predictor import Predictor, Timings

KERNEL = ("trivium_kernel_pictures_total", "trivium_kernel_poisoned_total")


@pytest.fixture(scope="module")
def predictor(tiny_bundle: Path) -> Predictor:
    return Predictor.load(tiny_bundle)


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(metrics.exposition()[1].decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


@pytest.mark.parametrize("bounds", [SECONDS, PICTURES, ENTROPY, INFORMATION, DIVERGENCE])
def test_buckets_ascend(bounds: list[float]) -> None:
    assert bounds == sorted(set(bounds))


def test_a_value_counts_up_to_and_at_its_bound() -> None:
    cells = Distribution([1.0, 2.0])
    for value in (0.5, 1.0, 1.5, 2.0, 3.0):
        cells.observe(value)
    assert cells.counts == [2, 2, 1]
    assert cells.total == 8.0


def test_a_model_is_exposed_as_zeros_before_its_first_request(predictor: Predictor) -> None:
    metrics = Metrics({"trivium_depth": ("Depth.", lambda: 3)}, lambda: 5)
    metrics.model(predictor)
    found = samples(metrics)
    model = {("model", "tiny"), ("version", "1")}
    assert found["trivium_requests_total", frozenset(model | {("code", "OK")})] == 0
    assert found["trivium_routed_total", frozenset(model | {("head", "robust")})] == 0
    assert found["trivium_stage_seconds_count", frozenset(model | {("stage", "total")})] == 0
    assert found["trivium_depth", frozenset()] == 3
    assert found["trivium_executed_pictures_total", frozenset()] == 5


def test_requests_are_counted_where_they_belong(predictor: Predictor, some_pictures: NDArray[np.uint8]) -> None:
    metrics = Metrics({}, lambda: 0)
    counted = metrics.model(predictor)
    first = replace(predictor.infer(some_pictures[0], "clean"), timings=Timings(1_000_000, 0, 30_000_000, 200_000))
    second = replace(predictor.infer(some_pictures[1], "mean"), timings=Timings(2_000_000, 0, 40_000_000, 300_000))
    counted.succeeded([first, second], queue_ns=5_000_000, total_ns=90_000_000)
    counted.failed("INVALID_ARGUMENT", 1_000)
    counted.failed("INVALID_ARGUMENT", 1_000)
    counted.expired += 1
    metrics.unknown("NOT_FOUND")
    found = samples(metrics)

    def value(name: str, **labels: str) -> float:
        return found[name, frozenset({"model": "tiny", "version": "1", **labels}.items())]

    sums = {"decode": 0.003, "queue": 0.005, "compute": 0.07, "route": 0.0005, "total": 0.09}
    for stage, seconds in sums.items():
        assert value("trivium_stage_seconds_sum", stage=stage) == pytest.approx(seconds)
        assert value("trivium_stage_seconds_bucket", stage=stage, le="+Inf") == 1
    assert value("trivium_stage_seconds_bucket", stage="decode", le="0.0032") == 1
    assert value("trivium_stage_seconds_bucket", stage="decode", le="0.0016") == 0
    assert value("trivium_requests_total", code="OK") == 1
    assert value("trivium_requests_total", code="INVALID_ARGUMENT") == 2
    assert value("trivium_expired_total") == 1
    assert value("trivium_routed_total", head="clean") == value("trivium_routed_total", head="mean") == 1
    assert value("trivium_predictive_entropy_nats_sum", head="robust") == pytest.approx(
        float(first.predictive_entropy[1]) + float(second.predictive_entropy[1])
    )
    assert value("trivium_divergence_nats_count") == 2
    assert found["trivium_requests_total", frozenset({("model", ""), ("version", ""), ("code", "NOT_FOUND")})] == 1


def test_one_head_has_no_divergence(single_head_bundle: Path) -> None:
    metrics = Metrics({}, lambda: 0)
    predictor = Predictor.load(single_head_bundle)
    counted = metrics.model(predictor)
    counted.succeeded([predictor.infer(np.zeros((32, 32, 3), np.uint8))], 0, 1)
    assert not [name for name, _ in samples(metrics) if name.startswith("trivium_divergence_nats_")]


def test_the_fused_kernel_counts_its_pictures_and_the_poisoned_ones(
    predictor: Predictor, some_pictures: NDArray[np.uint8]
) -> None:
    if predictor.engine.kernels != "fused":
        pytest.skip(f"the fused kernel does not run here: {predictor.engine.kernels_reason}")
    metrics = Metrics({}, lambda: 0)
    assert ("trivium_kernel_pictures_total", frozenset()) not in samples(metrics)
    metrics.model(predictor)
    before = samples(metrics)
    predictor.engine.run(some_pictures[:3])
    features = np.ones((2, 4), np.float32)
    features[1, 2] = np.nan
    mc_heads(features, np.ones((1, 3, 4)), np.zeros((1, 3)), np.ones(1), np.ones((2, 4), np.uint8), 1.0)
    gained = {name: samples(metrics)[name, frozenset()] - before[name, frozenset()] for name in KERNEL}
    assert gained == {"trivium_kernel_pictures_total": 5, "trivium_kernel_poisoned_total": 1}
