"""The simulation against queues whose answers are known, and what it says of clients, deaths and the autoscaler."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("simpy")
from . import page
from .capacity import Calibration, Compared, Results, Steady, Visit
from .cluster import Autoscaler, Cluster, Plan
from .simulation import Service, closed_loop, open_loop

RANDOM = np.random.default_rng(0).exponential(1.0, 100_000)
"""Seconds of service, mean 1."""
FOUR = (1.0,) * 4
TEN_MS = Service(np.full(1, 0.01), speeds=FOUR)


def test_one_server_is_the_queue_m_m_1() -> None:
    found = open_loop(Service(RANDOM), 1, 0.6, 40_000).latencies
    # exponential with mean 1 / (1 - load)
    assert found.mean() == pytest.approx(2.5, rel=0.08)
    assert np.quantile(found, 0.99) == pytest.approx(2.5 * math.log(100), rel=0.08)


def test_replicas_with_cores_of_their_own_do_not_meet() -> None:
    found = open_loop(Service(RANDOM, speeds=FOUR), 4, 2.4, 8_000).latencies
    assert found.mean() == pytest.approx(2.5, rel=0.08)


def test_replicas_that_share_a_core_answer_as_much_as_one() -> None:
    # the work that waits does not depend on who does it, and here all work left is alike
    assert open_loop(Service(RANDOM), 4, 0.6, 40_000).latencies.mean() == pytest.approx(2.5, rel=0.08)


def test_a_closed_loop_answers_what_the_cores_can() -> None:
    constant = np.full(1, 0.01)
    for speeds, expected in (((1.0,), 100), ((1.0, 1.0), 200), ((1.0, 0.8), 160), (FOUR, 400)):
        found = closed_loop(Service(constant, speeds=speeds), replicas=4, clients=2, seconds=10)
        assert len(found.latencies) / 10 == pytest.approx(expected, rel=0.01)
        # of 8 requests under way each waits for all the others
        assert np.median(found.latencies) == pytest.approx(8 / expected, rel=0.02)


def test_calibration_is_of_few_replicas_and_of_idle_ones() -> None:
    def visits(seconds: float) -> list[Visit]:
        return [Visit(np.full(10, seconds), 0.0, 0.0, 3.0)]

    # four share two cores with three others: five shared them before, now seven, and a tenth is lost besides
    sharing = visits(0.0125 * 7 / 5 / 0.9)
    service = Calibration(2, 4, visits(0.010), visits(0.0125), sharing, visits(0.013)).service()
    assert service.speeds == (1.0, pytest.approx(0.8))
    assert service.others == 3.0
    assert service.shared == pytest.approx(1 / 0.9)
    assert service.cold == pytest.approx(0.013)
    assert service.speed(4) == pytest.approx(0.8 * 5 / 7)
    assert replace(service, others=0.0).speed(4) == pytest.approx(0.4)
    alone = visits(0.010)
    assert Calibration(1, 2, alone, alone, visits(0.02), alone).service().speeds == (1.0,)


def test_work_on_shared_cores_takes_what_was_measured_there() -> None:
    service = Service(np.full(1, 0.010), shared=np.array([1.5]), speeds=(1.0, 1.0))
    apart = closed_loop(service, 2, 1, 1).latencies
    assert apart == pytest.approx(0.010)
    crowd = closed_loop(service, 4, 1, 10)
    assert len(crowd.latencies) / 10 == pytest.approx(200 / 1.5, rel=0.02)


def test_a_worker_that_was_idle_takes_the_cold_time() -> None:
    service = Service(np.full(1, 0.010), np.full(1, 0.013), speeds=FOUR)
    busy = closed_loop(service, 1, 1, 1).latencies
    assert busy[0] == pytest.approx(0.013), "the first"
    assert busy[1:] == pytest.approx(0.010), "the client asks again at once"
    assert np.median(open_loop(service, 1, 0.1, 5_000).latencies) == pytest.approx(0.013)


def test_a_death_is_a_retry_and_nothing_is_lost() -> None:
    plan = Plan(TEN_MS, [(0.0, 1200.0)], seconds=10, replicas=6, deaths=(3.0,), start_seconds=2.0)
    cluster = Cluster(plan)
    found = cluster.run()
    assert found.lost == 0
    # what the replica had, once each
    assert 1 <= found.failures["UNAVAILABLE"] <= 20
    assert set(found.failures) == {"UNAVAILABLE"}
    counts = dict(cluster.counts)
    assert [counts[moment] for moment in (2.0, 4.0, 6.0)] == [6, 5, 6]
    assert found.asked == pytest.approx(12_000, rel=0.05)


def test_too_much_is_refused_and_the_budget_ends_retries() -> None:
    found = Cluster(Plan(TEN_MS, [(0.0, 1600.0)], seconds=10, replicas=2, clients=10)).run()
    answered = len(found.latencies)
    # two replicas of four workers of 100 a second, and their queues
    assert answered == pytest.approx(8000 + 2 * 256, rel=0.03)
    assert found.lost == found.asked - answered
    assert found.failures["RESOURCE_EXHAUSTED"] < 1.2 * found.asked


def test_the_autoscaler_does_as_documented() -> None:
    scaler = Autoscaler.shipped(30)
    assert set(scaler.targets) == {"trivium_queue_seconds", "trivium_busy_ratio"}
    busy = scaler.targets["trivium_busy_ratio"]
    now = 0.0

    def decide(current: int, ratio: float) -> int:
        nonlocal now
        now += 15
        return scaler.decide(now, current, {"trivium_queue_seconds": 0.0, "trivium_busy_ratio": ratio * busy * current})

    assert decide(4, 1.0) == 4
    # within the tolerance
    assert decide(4, 1.09) == 4
    assert decide(4, 1.2) == 5
    # no faster than the policies: double within 30 s, or four more
    assert decide(5, 9.0) == 8
    assert decide(12, 9.0) <= 24
    # nothing is taken away before it was too much for the whole window
    assert decide(24, 0.1) == 24
    steps = [decide(24, 0.1) for _ in range(40)]
    assert steps[int(scaler.steady_seconds / 15) - 3] == 24
    assert steps[-1] == 23
    assert scaler.decide(now + 15, 30, {"trivium_queue_seconds": 99.0, "trivium_busy_ratio": 30.0}) == 30


def test_a_step_of_load_gets_more_replicas() -> None:
    slow = Service(np.full(1, 0.1), speeds=FOUR)
    plan = Plan(slow, [(0.0, 80.0), (30.0, 160.0)], seconds=150, replicas=3)
    cluster = Cluster(plan, Autoscaler.shipped(12))
    found = cluster.run()
    ready = [count for _, count in cluster.counts]
    assert ready[0] == 3
    assert max(ready) >= 6
    assert np.quantile(found.after(130.0), 0.99) < 0.3


def results() -> Results:
    one = Compared("open, 100/s", 99.0, 100.0, 10.0, 10.5, 50.0, 55.0)
    quantiles = np.linspace(5.0, 60.0, 100).tolist()
    scaling = {
        "seconds": [0.0, 5.0, 10.0], "asked_rps": [10.0, 20.0, 20.0], "answered_rps": [10.0, 19.0, 20.0],
        "p99_ms": [10.0, None, 12.0], "replicas": [1, 1, 2], "asked": 250, "lost": 5, "failures": {"UNAVAILABLE": 1},
    }  # fmt: skip
    return Results(
        "lite0", 2, 4, 9.0, 9.5, 11.0, 1.1, 1.1, 0.1, 10_000, [one], {"real": quantiles, "simulated": quantiles},
        [Steady(0.7, 36, 10.0, 20.0, 12, 0)], scaling,
    )  # fmt: skip


def test_what_agrees() -> None:
    whole = results()
    assert whole.agrees
    (one,) = whole.compared
    assert not replace(one, simulated_rps=110.0).agrees
    assert not replace(one, simulated_p99_ms=39.0).agrees
    assert not replace(one, simulated_p99_ms=61.0).agrees


def test_the_page_gets_its_tables_and_plot(tmp_path: Path) -> None:
    target = tmp_path / "CAPACITY.md"
    target.write_text(f"# Capacity\n\n{page.BEGIN}old\n{page.END}\nthe rest\n")
    for _ in range(2):
        page.renew(results(), tmp_path)
        text = target.read_text()
        assert text.startswith("# Capacity\n\n" + page.BEGIN)
        assert text.endswith(page.END + "\nthe rest\n")
        assert "old" not in text
        assert "| open, 100/s | 99.0 | 100.0 (+1%) | 10.0 | 10.5 (+5%) | 50.0 | 55.0 (+10%) |" in text
        assert "| 0.70 | 36 | 10.0 | 20.0 | 12 | 0 |" in text
    drawn = ET.fromstring((tmp_path / "capacity.svg").read_text())
    curves = drawn.findall(".//{http://www.w3.org/2000/svg}polyline")
    assert len(curves) == 2 + 2 + 1 + 1
    target.write_text("no place\n")
    with pytest.raises(SystemExit, match="does not say where"):
        page.renew(results(), tmp_path)
