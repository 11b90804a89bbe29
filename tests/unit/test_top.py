"""What two scrapes say, against values computed by hand and against PromQL's rule for quantiles."""

from __future__ import annotations

import io
import json
import re
from dataclasses import asdict, replace

import pytest
from rich.console import Console

from trivium.runtime import top_view
from trivium.runtime.scrape import Labels, Scrape, Window, quantile
from trivium.runtime.top import Frame, frame

INF = float("inf")
MODEL = {"model": "m", "version": "2"}


class Samples:
    """A scrape in the making."""

    def __init__(self) -> None:
        self.samples: dict[str, dict[Labels, float]] = {}

    def set(self, name: str, value: float, **labels: str) -> Samples:
        self.samples.setdefault(name, {})[frozenset(labels.items())] = value
        return self

    def histogram(self, name: str, counts: dict[str, float], total: float, **labels: str) -> Samples:
        for bound, count in counts.items():
            self.set(f"{name}_bucket", count, **labels, le=bound)
        return self.set(f"{name}_count", counts["+Inf"], **labels).set(f"{name}_sum", total, **labels)

    def at(self, moment: float) -> Scrape:
        return Scrape(moment, 1e9 + moment, self.samples)


def server(moment: float, served: int) -> Scrape:
    """A server of one model with two heads after `served` requests, of which half answered by each."""
    samples = Samples()
    samples.set("trivium_build_info", 1, release="9.9").set("trivium_ready", 1)
    samples.set("trivium_engine_info", 1, **MODEL, kernels="fused", device="cpu")
    samples.set("trivium_instances", 4).set("trivium_running_pictures", 1).set("trivium_queue_depth", 7)
    samples.set("trivium_queue_age_seconds", 2.5).set("process_start_time_seconds", 1e9 - 100)
    samples.set("process_cpu_seconds_total", moment / 2).set("process_resident_memory_bytes", 5e6)
    samples.set("trivium_requests_total", served, **MODEL, code="OK")
    samples.set("trivium_requests_total", 3, **MODEL, code="INTERNAL")
    samples.set("trivium_requests_total", served / 10, model="", version="", code="NOT_FOUND")
    samples.set("trivium_rejected_total", served / 2, **MODEL)
    samples.set("trivium_loads_total", 1, model="m", outcome="refused", reason="DigestMismatch")
    for head in ("a", "b"):
        samples.set("trivium_routed_total", served / 2, **MODEL, head=head)
        for name in ("trivium_predictive_entropy_nats", "trivium_mutual_information_nats"):
            samples.histogram(name, {"1.0": served, "+Inf": served}, served / 4, **MODEL, head=head)
    for stage in ("decode", "queue", "compute", "route", "total"):
        counts = {"0.1": served / 2, "0.2": served, "+Inf": served}
        samples.histogram("trivium_stage_seconds", counts, served / 8, **MODEL, stage=stage)
    return samples.at(moment)


@pytest.fixture
def two() -> Frame:
    return frame("h:1", server(10, 100), server(12, 300))


def test_a_frame_tells_rates_shares_and_quantiles_of_its_window(two: Frame) -> None:
    assert (two.release, two.ready, two.instances, two.queue_depth) == ("9.9", True, 4, 7)
    assert (two.queue_age_seconds, two.uptime_seconds, two.cpu_percent) == (2.5, 112, 50)
    assert (two.unknown_per_second, two.loads_refused) == (10, 1)
    (model,) = two.models
    assert (model.name, model.version, model.kernels) == ("m", "2", "fused")
    assert model.requests_per_second == {"OK": 100, "INTERNAL": 0}
    assert model.requests == {"OK": 300, "INTERNAL": 3}
    assert (model.rejected, model.rejected_per_second) == (150, 50)
    assert model.pictures_per_second == 100
    assert model.head_share == {"a": 0.5, "b": 0.5}
    total = model.stage_seconds["total"]
    assert total.p50 == pytest.approx(0.1)
    assert total.p99 == pytest.approx(0.198)
    assert total.mean == pytest.approx(0.125)
    assert model.predictive_entropy["b"].mean == pytest.approx(0.25)
    assert model.divergence is None
    assert json.loads(json.dumps(asdict(two)))["models"][0]["head_share"]["a"] == 0.5


def test_where_nothing_happened_nothing_is_claimed() -> None:
    (model,) = frame("h:1", server(10, 100), server(12, 100)).models
    assert model.head_share == {"a": None, "b": None}
    assert model.stage_seconds["total"].p50 is None
    assert model.requests_per_second["OK"] == 0


def test_a_restarted_server_counts_from_zero() -> None:
    window = Window(server(10, 1000), server(12, 40))
    assert window.gained("trivium_requests_total", **MODEL, code="OK") == 40


@pytest.mark.parametrize(
    ("q", "buckets", "value"),
    [
        (0.5, [(1.0, 10), (2.0, 20), (INF, 20)], 1.0),
        (0.75, [(1.0, 10), (2.0, 20), (INF, 20)], 1.5),
        (0.5, [(1.0, 0), (2.0, 0), (4.0, 8), (INF, 8)], 3.0),
        (0.99, [(1.0, 1), (INF, 100)], 1.0),
        (0.5, [(1.0, 0), (INF, 0)], None),
        (0.5, [], None),
    ],
)
def test_quantiles(q: float, buckets: list[tuple[float, float]], value: float | None) -> None:
    assert quantile(q, buckets) == value


def shown(renderable: object, width: int = 120) -> str:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(renderable)
    return out.getvalue()


def test_a_frame_shows_what_matters(two: Frame) -> None:
    text = shown(top_view.render(two, [1.0, 100.0]))
    for pattern in (
        r"trivium 9\.9 +h:1 +● ready +up 1 min 52 s", r"requests/s 110 ", r"CPU 50 %", r"oldest 2\.5 s",
        r"10\.0/s for models not served · 1 bundles refused", r"OK +100 +300", r"shed +50\.0 +150",
        r"INTERNAL +0 +3", r"total +100\.0 +198\.0 +125\.0", r"a +50 %", "▁█ to 100",
    ):  # fmt: skip
        assert re.search(pattern, text), pattern


def test_drift_is_shown_where_the_server_watches_it(two: Frame) -> None:
    assert two.models[0].drift is None
    assert "drift" not in shown(top_view.render(two, [1.0]))

    def watched(alarm: int, **stability: float) -> Frame:
        samples = server(12, 300).samples
        found = Samples()
        found.samples = samples
        found.set("trivium_drift_alarm", alarm, **MODEL).set("trivium_drift_alarms_total", 2, **MODEL)
        found.set("trivium_drift_evidence", 1.25, **MODEL).set("trivium_drift_evidence_limit", 4.6, **MODEL)
        found.set("trivium_drift_window_pictures", 500, **MODEL)
        for name, value in stability.items():
            found.set("trivium_drift_psi", value, **MODEL, statistic=name)
        return frame("h:1", server(10, 100), found.at(12))

    early = watched(0)
    assert early.models[0].drift is not None
    assert (early.models[0].drift.alarm, early.models[0].drift.alarms) == (False, 2)
    assert re.search(r"drift ● none   evidence 10\^1\.2 of 10\^4\.6   stability index 500 pictures so far", shown(
        top_view.render(early, [1.0])
    ))  # fmt: skip
    late = watched(1, energy=0.4, class_id=0.5)
    text = shown(top_view.render(late, [1.0]))
    assert "pictures unlike the calibration's" in text
    assert "class id 0.50, energy 0.40" in text
    assert len(shown(top_view.render(late, [1.0], 120, 24)).splitlines()) <= 24


@pytest.mark.parametrize("models", [1, 9])
@pytest.mark.parametrize("width", [80, 120])
def test_a_small_screen_holds_every_model(two: Frame, models: int, width: int) -> None:
    many = replace(two, models=[replace(two.models[0], name=f"model{i}") for i in range(models)])
    text = shown(top_view.render(many, [1.0], width, 24), width)
    assert len(text.splitlines()) <= 24
    assert all(f"model{i}" in text for i in range(models))
    gone = shown(top_view.gone("h:1: Connection refused", many, [1.0], width, 24), width)
    assert "h:1: Connection refused; trying again" in gone
    assert len(gone.splitlines()) <= 24
