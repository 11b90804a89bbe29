"""The serving benchmark's arithmetic: medians, the comparison with the engine, and what the summary claims."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("psutil", reason="pip install psutil")

from tests.bench.serve import Visited
from tests.bench.serving import report
from tests.bench.serving.limit import Limit
from tests.bench.serving.load import Load
from tests.bench.serving.peers import read_raw

LIMIT = Limit(rps=200.0, cpu_ms=10.0, ms=9.0)
SLOWER = Limit(rps=100.0, cpu_ms=14.0, ms=11.0)


def visited(failed: int = 0) -> report.Visit:
    latencies = np.arange(1, 101) / 1e3
    load = Load(latencies, failed, "", rps=120.0, client_cpu_ms=0.1, answer=b"")
    return Visited(load, cpu_seconds=1.5, memory_mb=(300.0, 200.0)).beside((LIMIT, LIMIT), (SLOWER, SLOWER))


def test_a_visit_is_compared_with_the_probes_on_both_sides() -> None:
    found = visited()
    assert found.ratio_to_limit == pytest.approx(120 / 150)
    assert found.cpu_ms_per_request == pytest.approx(15.0)
    assert found.efficiency == pytest.approx(12 / 15)
    assert found.engine_ms == pytest.approx(10.0)
    assert (found.p50_ms, found.p99_ms) == (pytest.approx(50.5), pytest.approx(99.01))
    # a refused request costs the server too
    assert visited(failed=100).cpu_ms_per_request == pytest.approx(7.5)
    assert visited(failed=100).failed == 0.5


def rows() -> list[report.Row]:
    ours, theirs = visited(), replace(visited(), rps=100.0, cpu_ms_per_request=30.0, efficiency=0.4)
    found = [report.row("trivium", "lite0", n, "closed", 1.0, 0.0, [ours]) for n in (1, 4)]
    found.append(report.row("trivium", "lite0", 16, "closed", 1.0, 0.0, [replace(ours, rps=114.0)]))
    found.append(report.row("trivium, JPEG", "lite0", 4, "closed", 1.0, 0.0, [replace(ours, rps=900.0)]))
    found.append(report.row("trivium", "lite0", 64, "0.8 open", 1.0, 0.0, [ours]))
    return [*found, report.row("other", "lite0", 4, "closed", 2.0, 0.5, [theirs])]


def test_medians_over_visits() -> None:
    visits = [replace(visited(), p99_ms=ms) for ms in (1.0, 100.0, 3.0)]
    found = report.row("one", "tiny", 1, "closed", 1.0, 0.0, visits)
    assert (found.median.p99_ms, found.visits) == (3.0, 3)


def test_the_summary_compares_with_others_and_with_itself() -> None:
    text = report.summary(rows())
    assert "lite0, 1 clients: p50 is 5.05 times the engine's call" in text
    assert "lite0, 4 clients: 1.200 times the throughput of the fastest other, other" in text
    assert "2.000 times the work per CPU second of the leanest, other" in text
    assert "lite0, 16 clients: 0.950 times the throughput at 4" in text


def test_the_document_has_every_column(tmp_path: Path) -> None:
    path = tmp_path / "bench/serve.json"
    report.write(rows(), path)
    first = json.loads(path.read_text())[0]
    wanted = "server model concurrency rps ratio_to_limit cpu_ms_per_request efficiency p50_ms p99_ms rss_mb"
    assert set(f"{wanted} client_cpu_ms ready_s".split()) <= set(first)
    assert len(report.table(rows()).splitlines()) == 1 + len(rows())
    assert report.markdown(rows()).count("\n") == 1 + len(rows())


def test_outputs_behind_one_another_are_told_apart() -> None:
    expected = {"a": np.arange(6, dtype=np.float32).reshape(1, 2, 3), "b": np.full((1, 2), 7, np.float32)}
    found = read_raw(expected)(b"".join(values.tobytes() for values in expected.values()))
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values.ravel())
