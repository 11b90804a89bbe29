"""Drift: the sequential test's p-values and false alarms, what it finds, and the population stability index."""

from __future__ import annotations

from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families
from tests.conftest import tiny_guarantees, tiny_manifest

from trivium.kernels import HeadStatistics
from trivium.runtime.drift import (
    BLOCK,
    CELLS,
    COARSE,
    HOLD,
    LOG_BETS,
    LOG_WEIGHTS,
    Drift,
    Martingales,
    drift_values,
    merged,
    watch,
)
from trivium.runtime.guarantees import DriftReference, DriftStatistic
from trivium.runtime.metrics import Metrics
from trivium.runtime.predictor import Predictor

SCORES: tuple[DriftStatistic, ...] = ("predictive_entropy", "mutual_information", "divergence", "energy")
CLASSES = 10


def stream(rng: np.random.Generator, count: int, shifted: float = 0.0) -> dict[DriftStatistic, NDArray[np.float64]]:
    """Statistics with a common cause, a share of them raised by 1.5 standard deviations; every tenth entropy is 0."""
    common = rng.normal(size=count) + 1.5 * (rng.random(count) < shifted)
    values: dict[DriftStatistic, NDArray[np.float64]] = {
        name: 0.8 * common + 0.6 * rng.normal(size=count) for name in SCORES
    }
    values["predictive_entropy"] *= rng.random(count) < 0.9
    values["class_id"] = rng.integers(0, CLASSES, count).astype(np.float64)
    return values


def reference(rng: np.random.Generator, pictures: int, bins: int = 100) -> DriftReference:
    """Edges are quantiles of other pictures."""
    other, counted = stream(rng, 1000), stream(rng, pictures)
    edges = {name: np.quantile(other[name], np.arange(1, bins) / bins).tolist() for name in SCORES}
    counts = {
        name: np.bincount(np.searchsorted(edges[name], counted[name]), minlength=bins).tolist() for name in SCORES
    }
    counts["class_id"] = np.bincount(counted["class_id"].astype(int), minlength=CLASSES).tolist()
    return DriftReference(pictures=pictures, edges=edges, counts=counts, head="clean")


@pytest.fixture(scope="module")
def predictor(tiny_bundle: Path) -> Predictor:
    return Predictor.load(tiny_bundle)


@pytest.fixture
def make(predictor: Predictor) -> Any:
    def drift(rng: np.random.Generator, pictures: int = 2000, window: int = 1000, run_length: int = 10**7) -> Drift:
        return Drift(predictor.manifest, reference(rng, pictures), window, run_length)

    return drift


def test_bets_are_fair() -> None:
    np.testing.assert_allclose(np.exp(LOG_BETS).mean(1), 1, rtol=1e-12)
    assert np.exp(LOG_WEIGHTS).sum() == pytest.approx(1)


def test_p_values_are_those_of_their_definition() -> None:
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 9, (2, 7))
    counts[1, 0] += counts[0].sum() - counts[1].sum()
    test, ties = Martingales(counts.copy()), np.random.Generator(np.random.Philox(key=0))
    for _ in range(2):
        bins = rng.integers(0, 7, (2, BLOCK))
        p = test.p_values(bins)
        theta = ties.random(BLOCK)
        for row in range(2):
            for at, bin in enumerate(bins[row]):
                counts[row, bin] += 1
                expected = counts[row, bin + 1 :].sum() + theta[at] * counts[row, bin]
                assert p[row, at] == pytest.approx(expected / counts[row].sum(), rel=1e-12)


def test_p_values_are_uniform_however_small_the_reference() -> None:
    """Against the histogram of the 40 pictures alone, half of the cells would be more than five deviations off."""
    rng = np.random.default_rng(2)
    counts = np.bincount(rng.integers(0, 20, 40), minlength=20)[None]
    blocks = 200
    p = Martingales(counts)
    found = np.concatenate([p.p_values(rng.integers(0, 20, (1, BLOCK)))[0] for _ in range(blocks)])
    cells = np.bincount((20 * found).astype(int), minlength=20)
    expected = blocks * BLOCK / 20
    assert (np.abs(cells - expected) < 5 * np.sqrt(expected)).all()
    assert np.corrcoef(found[:-1], found[1:])[0, 1] == pytest.approx(0, abs=5 / np.sqrt(len(found)))
    fixed = np.bincount(rng.integers(0, 20, blocks * BLOCK), minlength=20)
    assert (np.abs(fixed - counts[0] / 40 * blocks * BLOCK) > 5 * np.sqrt(expected)).sum() >= 10


def test_false_alarms_are_as_rare_as_promised(make: Any) -> None:
    """20 streams of 20 blocks at a run length of 80: an alarm with probability at most a quarter in each.

    The same bets on the calibration pictures' histogram alone take its own error for drift.
    """
    streams, blocks, run_length = 20, 20, 80
    alarmed = {"stream": 0, "histogram alone": 0}
    for compared in alarmed:
        rng = np.random.default_rng(3)
        for _ in range(streams):
            drift = make(rng, pictures=150, run_length=run_length * BLOCK)
            for _ in range(blocks):
                drift.work(stream(rng, BLOCK))
                if compared == "histogram alone":
                    drift._test._counts = drift._test._reference.copy()
            alarmed[compared] += drift.alarms > 0
    share = blocks / run_length
    assert alarmed["stream"] <= streams * share + 2 * np.sqrt(streams * share * (1 - share))
    assert alarmed["histogram alone"] > 2 * share * streams


@pytest.mark.parametrize("before", [0, 40])
def test_a_fifth_of_other_pictures_is_found_soon_at_the_start_and_late(make: Any, before: int) -> None:
    for seed in range(3):
        rng = np.random.default_rng(seed)
        drift = make(rng, pictures=5000)
        for _ in range(before):
            drift.work(stream(rng, BLOCK))
        assert drift.alarms == 0
        for _ in range(2000 // BLOCK):
            drift.work(stream(rng, BLOCK, shifted=0.2))
        assert drift.alarms > 0
        assert drift.alarm


def test_a_class_that_comes_more_often_is_found(make: Any) -> None:
    rng = np.random.default_rng(5)
    drift = make(rng, pictures=5000)
    for _ in range(2000 // BLOCK):
        values = stream(rng, BLOCK)
        values["class_id"] = np.where(rng.random(BLOCK) < 0.15, 3.0, values["class_id"])
        drift.work(values)
    assert drift.alarms > 0


def test_an_alarm_stays_until_long_after(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(6)
    drift = make(rng)
    while not drift.alarm:
        drift.work(stream(rng, BLOCK, shifted=1))
    for _ in range(3):
        drift.work(stream(rng, BLOCK, shifted=1))
    # it begins anew with each alarm, and what goes on being unlike the calibration is told once
    assert drift.alarms > 1
    assert len([one for one in caplog.records if one.message.startswith("drift: ")]) == 1
    quiet = 0
    while drift.alarm:
        drift.work(stream(rng, BLOCK))
        quiet += BLOCK
    assert HOLD <= quiet <= HOLD + BLOCK


def test_the_same_stream_gives_the_same_evidence(make: Any) -> None:
    evidence = []
    for _ in range(2):
        rng = np.random.default_rng(7)
        drift = make(rng)
        drift.work(stream(rng, BLOCK))
        evidence.append(drift.evidence)
    assert evidence[0] == evidence[1]


def test_stability_is_that_of_the_last_pictures(make: Any) -> None:
    rng = np.random.default_rng(8)
    drift = make(rng, pictures=5000, window=2 * BLOCK + 10)
    for _ in range(2):
        drift.work(stream(rng, BLOCK, shifted=1))
    assert drift.stability() == {}
    drift.work(stream(rng, BLOCK, shifted=1))
    assert drift.stability()["energy"] > 0.25
    values = [stream(rng, BLOCK) for _ in range(3)]
    for block in values:
        drift.work(block)
    assert drift.pictures == drift.window == 2 * BLOCK + 10
    small = drift.stability()
    assert max(small.values()) < 0.1
    # by hand, of the class, whose ten bins are the classes
    last = np.concatenate([block["class_id"] for block in values])[-drift.window :]
    q = (np.bincount(last.astype(int), minlength=CLASSES) + 0.5) / (len(last) + 0.5 * CLASSES)
    counts = reference(np.random.default_rng(8), 5000).counts["class_id"]
    p = (np.array(counts) + 0.5) / (5000 + 0.5 * CLASSES)
    assert small["class_id"] == pytest.approx(((q - p) * np.log(q / p)).sum())


@pytest.mark.parametrize(
    ("counts", "bins", "expected"),
    [
        ([5] * 4, 2, [0, 0, 1, 1]),
        ([5] * 10, 10, list(range(10))),
        ([0, 0, 9, 0], 10, [0, 0, 1, 2]),
        ([90, 5, 5], 10, [0, 1, 1]),
    ],
)
def test_bins_merge_to_equal_counts(counts: list[int], bins: int, expected: list[int]) -> None:
    assert merged(counts, bins).tolist() == expected
    assert merged([1] * 1000, COARSE).tolist() == [i // 100 for i in range(1000)]


def test_pictures_are_taken_in_as_calibration_counts_them(
    predictor: Predictor, some_pictures: NDArray[np.uint8], make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drift = make(np.random.default_rng(9))
    blocks: list[dict[DriftStatistic, NDArray[np.float64]]] = []
    monkeypatch.setattr(drift, "work", blocks.append)
    found = [predictor.infer(picture) for picture in some_pictures]
    for at in range(BLOCK):
        drift.add(found[at % len(found)])
    statistics = HeadStatistics(*(np.stack(column) for column in zip(*(
        (one.head_probabilities, one.predictive_entropy, one.mutual_information, one.divergence, one.energy)
        for one in found
    ), strict=True)))  # fmt: skip
    class_id = np.array([one.class_id for one in found])
    expected = drift_values(statistics, class_id, predictor.manifest.heads, "clean")
    assert blocks[0].keys() == expected.keys() == set(SCORES) | {"class_id"}
    for name, values in expected.items():
        np.testing.assert_array_equal(blocks[0][name], np.resize(values, BLOCK))


def test_drift_is_exposed_and_begins_anew_with_a_reload(predictor: Predictor, make: Any) -> None:
    rng = np.random.default_rng(10)
    metrics = Metrics({}, lambda: 0, lambda manifest: make(np.random.default_rng(10), window=BLOCK))

    def samples() -> dict[str, float]:
        families = text_string_to_metric_families(metrics.exposition()[1].decode())
        found = [sample for family in families for sample in family.samples if sample.name.startswith("trivium_drift")]
        assert all((one.labels["model"], one.labels["version"]) == ("tiny", "1") for one in found)
        return {sample.name + sample.labels.get("statistic", ""): sample.value for sample in found}

    drift = metrics.model(predictor).drift
    assert drift is not None
    before = samples()
    assert before["trivium_drift_alarm"] == before["trivium_drift_alarms_total"] == 0
    assert before["trivium_drift_evidence"] == 0
    assert before["trivium_drift_evidence_limit"] == pytest.approx(np.log10(10**7 / BLOCK))
    assert "trivium_drift_psienergy" not in before
    while not drift.alarm:
        drift.work(stream(rng, BLOCK, shifted=1))
    after = samples()
    assert after["trivium_drift_alarm"] == after["trivium_drift_alarms_total"] == 1
    assert after["trivium_drift_psienergy"] == pytest.approx(drift.stability()["energy"])
    assert after["trivium_drift_window_pictures"] == BLOCK
    metrics.model(predictor)
    renewed = samples()
    assert renewed["trivium_drift_alarm"] == renewed["trivium_drift_window_pictures"] == 0
    assert renewed["trivium_drift_alarms_total"] == 1


def test_what_cannot_or_shall_not_be_watched_is_not() -> None:
    assert watch(tiny_manifest(guarantees=tiny_guarantees()), 0, 10**7) is None
    assert watch(tiny_manifest(), 1000, 10**7) is None
    assert watch(tiny_manifest(guarantees=tiny_guarantees()), 1000, 10**7) is not None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"counts": {"energy": [3, 4], "class_id": [3, 4, 1]}}, "counts of class_id do not sum"),
        ({"counts": {"energy": [7], "class_id": [7]}}, "one count more than edges"),
        ({"edges": {}}, "needs edges and counts"),
        ({"counts": {"energy": [3, 2, 2], "class_id": [7]}, "edges": {"energy": [1, 0]}}, "must ascend"),
    ],
)
def test_a_reference_that_does_not_add_up_is_refused(change: dict[str, Any], says: str) -> None:
    whole = {"pictures": 7, "edges": {"energy": [0]}, "counts": {"energy": [3, 4], "class_id": [5, 2]}, "head": "a"}
    DriftReference.model_validate(whole)
    with pytest.raises(ValueError, match=says):
        DriftReference.model_validate(whole | change)


def test_a_bet_pays_for_what_it_bets_on() -> None:
    """At the end of a block all at p = 0, a martingale that began with it has won the bet's highest payment each."""
    test = Martingales(np.array([[10**9, 0]]))
    test.bet(np.ones((1, BLOCK), np.intp))
    best = LOG_BETS[:, 0].max()
    assert test.evidence == pytest.approx(BLOCK * best + float(LOG_WEIGHTS[LOG_BETS[:, 0].argmax()]), rel=1e-3)
    assert log(CELLS) > best
