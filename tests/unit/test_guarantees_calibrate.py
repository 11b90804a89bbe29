"""What may be promised: quantiles and coverage against theory, views by their mixture, thresholds of every router."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tests.unit.test_calibrate import DROPOUT, PREPROCESSING, answers, statistics_of

from trivium.kernels import HeadStatistics
from trivium.runtime.bundle import Manifest
from trivium.runtime.errors import ConfigError
from trivium.runtime.guarantees import SetScore
from trivium.runtime.predictor import Predictor
from trivium.runtime.promises import confidence, conformity_scores
from trivium.runtime.router import route, shift_probability
from trivium.train.calibration.comparison import provisional
from trivium.train.data.pictures import load_pictures, load_whole, parse_spec
from trivium.train.guarantees.calibrate import (
    Settings,
    calibrate_bundle,
    certified_risks,
    check_risk,
    guarantees_of,
    least_in_all,
    today,
    tuning_pictures,
    with_guarantees,
)
from trivium.train.guarantees.conformal import covered, least_pictures, quantiles, set_sizes
from trivium.train.guarantees.views import COMPONENTS, Views, ask, draw_kinds, look, parse_mixture
from trivium.train.shifts.corruptions import CALIBRATION_CORRUPTIONS, corrupt

HEADS = ["clean", "robust", "combined"]
HALF = {"clean": 0.5, "corrupted": 0.5}


def manifest(heads: list[str] = HEADS, classes: int = 4) -> Manifest:
    bare = provisional([f"class {i}" for i in range(classes)], heads, PREPROCESSING, DROPOUT)
    return bare.model_copy(update={"router": bare.router.model_copy(update={"default": heads[-1]})})


def views(n: int, seed: int, heads: int = 3, fall: float = 0.1) -> Views:
    """Surer answers are likelier right, shifted pictures are harder for the clean head, and look shifted."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 4, n)
    moved = draw.random(n) < 0.5

    def seen(shifted: np.ndarray) -> HeadStatistics:
        sure = draw.uniform(0.4, 0.99, n)
        each = []
        for k in range(heads):
            right = draw.random(n) < sure**0.3 - (fall if k == 0 else 0) * shifted
            each.append([answers(right[i : i + 1], labels[i : i + 1], sure[i])[0] for i in range(n)])
        noise = draw.normal(size=(n, heads))
        return HeadStatistics(*(
            np.asarray(column, np.float32)
            for column in statistics_of(
                np.stack(each, 1), np.exp(0.3 * noise - 3 + 2 * shifted[:, None]), noise - 6 + 3 * shifted[:, None]
            )
        ))  # fmt: skip

    kind = np.where(moved, "spatter", "clean")
    return Views(seen(moved), labels, kind, seen(np.zeros(n, bool)), seen(np.ones(n, bool)))


def test_a_quantile_is_the_score_of_its_rank_recomputed_in_fractions() -> None:
    scores = np.random.default_rng(0).normal(size=250)
    coverages = [percent / 100 for percent in range(80, 100)]
    # ceil((n + 1) percent / 100) in whole numbers
    expected = [sorted(scores)[-(-251 * percent // 100) - 1] for percent in range(80, 100)]
    assert quantiles(np.maximum(scores, 0), coverages) == pytest.approx(np.maximum(expected, 0))
    assert quantiles(np.full(200, -np.inf), [0.8, 0.99]) == [0, 0]


@pytest.mark.parametrize(("coverage", "needed"), [(0.8, 4), (0.9, 9), (0.95, 19), (0.99, 99), (0.995, 199)])
def test_fewer_pictures_than_needed_have_no_quantile(coverage: float, needed: int) -> None:
    assert least_pictures(coverage) == needed
    assert quantiles(np.arange(needed, dtype=float), [coverage]) == [needed - 1]
    with pytest.raises(ValueError, match="no quantile"):
        quantiles(np.arange(needed - 1, dtype=float), [coverage])


@pytest.mark.parametrize("score", ["lac", "raps"])
def test_coverage_is_exact_in_finite_samples(score: SetScore) -> None:
    # with n calibration pictures and no ties, coverage averages ceil((n + 1) c) / (n + 1) exactly (Vovk et al. 2005)
    draw = np.random.default_rng(1)
    n, trials, coverage = 33, 3000, 0.93
    logits = draw.normal(size=(trials * (n + 1), 5)) * 2
    p = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float32)
    labels = (np.cumsum(p, 1) < draw.random(len(p))[:, None]).sum(1).clip(0, 4)
    scores = conformity_scores(p, p.argmax(1), score, 0.1, 1)
    kept = []
    for rows in np.arange(len(p)).reshape(trials, n + 1):
        own = scores[rows]
        quantile = quantiles(own[np.arange(n), labels[rows[:n]]], [coverage])[0]
        kept.append(bool(covered(own[n:], labels[rows[n:]], quantile)[0]))
        assert set_sizes(own[n:], quantile)[0] >= 1
    exact = 32 / 34
    assert abs(np.mean(kept) - exact) < 4 * np.sqrt(exact * (1 - exact) / trials)


def test_views_are_drawn_by_the_mixture() -> None:
    kinds, severities = draw_kinds(parse_mixture("clean=0.4,corrupted=0.4,fog=0.2"), 20000, seed=3)
    counts = Counter(kinds.tolist())
    expected = {"clean": 0.4, "fog": 0.2} | dict.fromkeys(CALIBRATION_CORRUPTIONS, 0.1)
    assert counts.keys() == expected.keys()
    for name, share in expected.items():
        assert counts[name] / 20000 == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 20000))
    assert np.bincount(severities)[1:] / 20000 == pytest.approx(np.full(5, 0.2), abs=0.015)
    assert draw_kinds(HALF, 20000, 3)[0].tolist() != draw_kinds(HALF, 20000, 4)[0].tolist()
    assert set(draw_kinds({"clean": 1.0}, 50, 0)[0]) == {"clean"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("clean=0.5,foggy=0.5", "'foggy' is none of clean, corrupted, augmented"),
        ("clean=0.5,corrupted=0.4", "sum to 0.9, not to 1"),
        ("clean=0.5,clean=0.5", "clean stands twice"),
        ("clean", "the share of clean must be a number from 0 to 1"),
        ("clean=half,corrupted=0.5", "the share of clean"),
        ("clean=1.5,corrupted=-0.5", "the share of clean"),
        ("clean=nan,corrupted=1", "the share of clean"),
        ("", "'' is none of"),
    ],
)
def test_a_mixture_that_is_none_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_mixture(text)


def test_a_part_without_a_share_is_left_out() -> None:
    assert parse_mixture("clean=1, corrupted=0") == {"clean": 1}
    assert set(COMPONENTS) > {"clean", "corrupted", "augmented", "fog", "spatter"}


def test_looking_is_what_the_engine_says_row_by_row(tiny_bundle: Path, labelled: Path) -> None:
    predictor = Predictor.load(tiny_bundle)
    pictures = load_pictures(parse_spec(str(labelled)), "calibration", predictor.manifest.preprocessing)
    assert len(pictures) >= 8
    found = look(predictor, pictures, {"clean": 0.3, "spatter": 0.7}, seed=5)
    order = np.random.Generator(np.random.Philox(5)).permutation(len(pictures))
    kinds, severities = draw_kinds({"clean": 0.3, "spatter": 0.7}, len(pictures), 5)
    assert found.kind.tolist() == kinds[order].tolist()
    assert {"clean", "spatter"} == set(found.kind)
    assert found.labels.tolist() == [int(pictures.classes[i].split()[1]) for i in pictures.labels[order]]
    images = pictures.batch(order).permute(0, 2, 3, 1).contiguous().numpy()
    for i, (image, place) in enumerate(zip(images, order, strict=True)):
        view = image[None]
        if kinds[place] != "clean":
            view = corrupt(view, "spatter", int(severities[place]), 5, int(place))
        for column, expected in zip(found.statistics, predictor.engine.run(view), strict=True):
            assert (column[i] == expected[0]).all()
        assert (found.clean.probabilities[i] == predictor.engine.run(image[None]).probabilities[0]).all()
    # the views of a picture do not depend on which others are looked at
    few = look(predictor, pictures, {"clean": 0.3, "spatter": 0.7}, seed=5, order=order[3:6], shifted=False)
    assert few.shifted is None
    assert (few.statistics.energy == found.statistics.energy[3:6]).all()
    taken = found.take(slice(3, 6))
    assert (taken.statistics.energy == few.statistics.energy).all()
    assert taken.shifted is not None
    assert len(taken) == len(taken.shifted.energy) == 3


def test_answers_that_are_no_numbers_are_refused(tiny_bundle: Path) -> None:
    class Broken:
        def run(self, images: np.ndarray) -> HeadStatistics:
            found = Predictor.load(tiny_bundle).engine.run(images)
            return found._replace(energy=found.energy * np.nan)

    with ThreadPoolExecutor(1) as pool, pytest.raises(Exception, match="not a number"):
        ask(Broken(), np.zeros((2, 32, 32, 3), np.uint8), pool)  # type: ignore[arg-type]


def test_every_router_gets_thresholds_that_keep_their_promise_on_fresh_views() -> None:
    settings = Settings(seed=0, accuracy_loss=0.05, negative_flips=0.1)
    tuning, calibration, fresh = views(400, 1), views(1600, 2), views(4000, 3)
    guarantees, guard = guarantees_of(manifest(), tuning, calibration, settings)
    assert guard is not None
    whole = with_guarantees(manifest(), guarantees, guard)
    assert list(guarantees.routers) == whole.routers() == [*HEADS, "mean", "min_entropy", "guard"]
    assert (guarantees.pictures, guarantees.tuning_pictures) == (1600, 400)
    place = guarantees.coverages.index(0.9)
    for name, own in guarantees.routers.items():
        routed = route(fresh.statistics, whole, name)
        for score, row in (("lac", own.lac), ("raps", own.raps)):
            scores = conformity_scores(routed.probabilities, routed.class_id, score, 0.01, 5)  # type: ignore[arg-type]
            assert row == sorted(row)
            assert covered(scores, fresh.labels, row[place]).mean() > 0.9 - 0.035
        ranked = confidence(routed, fresh.statistics, whole, own.confidence)
        wrong = routed.class_id != fresh.labels
        for risk in certified_risks(guarantees, name):
            least = own.least[guarantees.risks.index(risk)]
            assert least is not None
            assert wrong[ranked >= least].mean() < risk + 0.02
    assert 0.05 in certified_risks(guarantees, "combined") or 0.1 in certified_risks(guarantees, "combined")

    shift = shift_probability(fresh.statistics, guarantees.shift, HEADS)
    assert shift[fresh.kind != "clean"].mean() > 0.8 > 0.2 > shift[fresh.kind == "clean"].mean()
    guarded = route(fresh.statistics, whole, "guard")
    assert 0 < np.mean(np.array(guarded.head) == "combined") < 1


def test_a_guards_sets_rest_on_pictures_that_its_threshold_was_not_chosen_on() -> None:
    tuning, calibration = views(200, 1), views(800, 2)
    settings = Settings(accuracy_loss=0.1, negative_flips=0.1)
    guarantees, guard = guarantees_of(manifest(), tuning, calibration, settings)
    assert guard is not None
    whole = with_guarantees(manifest(), guarantees, guard)
    second = calibration.take(np.arange(400, 800))
    routed = route(second.statistics, whole, "guard")
    scores = conformity_scores(routed.probabilities, routed.class_id, "lac", 0, 0)
    assert guarantees.routers["guard"].lac == quantiles(scores[np.arange(400), second.labels], guarantees.coverages)
    # other answers to the second half cannot change what was certified on the first
    labels = np.concatenate([calibration.labels[:400], (calibration.labels[400:] + 1) % 4])
    other = Views(calibration.statistics, labels, calibration.kind, calibration.clean)
    assert guarantees_of(manifest(), tuning, other, settings)[1] == guard


def test_there_is_no_guard_without_another_router_or_enough_pictures() -> None:
    tuning = views(100, 1)
    assert guarantees_of(manifest(), tuning, views(150, 2), Settings())[1] is None
    alone = manifest(["combined", "robust", "clean"])
    assert guarantees_of(alone, tuning, views(400, 2), Settings(accuracy_loss=0.2, negative_flips=0.2))[1] is None
    one = manifest(["original"])
    guarantees, guard = guarantees_of(one, views(100, 1, heads=1), views(150, 2, heads=1), Settings())
    assert guard is None
    assert list(guarantees.routers) == ["original"]
    assert guarantees.drift.counts.keys() == {"predictive_entropy", "mutual_information", "energy", "class_id"}


def test_a_guard_that_answers_by_default_gives_way_where_none_is_certified() -> None:
    tuning = views(200, 1)
    lenient = Settings(accuracy_loss=0.1, negative_flips=0.1)
    guarantees, guard = guarantees_of(manifest(), tuning, views(800, 2), lenient)
    whole = with_guarantees(manifest(), guarantees, guard)
    by_guard = whole.model_copy(update={"router": whole.router.model_copy(update={"default": "guard"})})
    again, same = guarantees_of(by_guard, tuning, views(800, 2), lenient)
    assert (same, with_guarantees(by_guard, again, same).router.default) == (guard, "guard")
    strict, none = guarantees_of(by_guard, tuning, views(300, 2), Settings(accuracy_loss=0.0001))
    assert none is None
    assert with_guarantees(by_guard, strict, none).router.default == "combined"


def test_the_bundles_own_risk_leaves_four_fifths_answered_or_is_what_was_asked_for() -> None:
    tuning, calibration = views(400, 1), views(1600, 2)
    guarantees, _ = guarantees_of(manifest(), tuning, calibration, Settings())
    assert guarantees.max_risk is not None
    own = guarantees.routers["combined"]
    least = own.least[guarantees.risks.index(guarantees.max_risk)]
    assert least is not None
    ranked = confidence(route(calibration.statistics, manifest()), calibration.statistics, manifest(), own.confidence)
    assert (ranked >= least).mean() > 0.7
    asked, _ = guarantees_of(manifest(), tuning, calibration, Settings(max_risk=0.17, coverage=0.925))
    assert (asked.max_risk, asked.coverage) == (0.17, 0.925)
    assert 0.17 in asked.risks
    assert 0.925 in asked.coverages
    check_risk(asked, "combined", 0.17)
    strict, _ = guarantees_of(manifest(), tuning, calibration, Settings(max_risk=0.001))
    least_risk = min(certified_risks(strict, "combined"))
    with pytest.raises(
        ConfigError, match=rf"--max-risk 0.001 cannot be .* 1600 .*: the least that can is {least_risk:g}"
    ):
        check_risk(strict, "combined", 0.001)


def test_too_few_pictures_are_refused_with_the_number_needed() -> None:
    assert least_in_all(0.99) == 131
    assert 131 - tuning_pictures(131) == 99 > 130 - tuning_pictures(130)
    for views_, needed, settings in ((98, "99", Settings()), (150, "199", Settings(coverage=0.995))):
        with pytest.raises(ConfigError, match=f"needs {needed} calibration pictures .* there are {views_}"):
            guarantees_of(manifest(), views(33, 1), views(views_, 2), settings)


def test_the_parts_are_disjoint_and_as_large_as_is_said(tiny_bundle: Path, labelled: Path) -> None:
    predictor = Predictor.load(tiny_bundle)
    pictures = load_whole(parse_spec(str(labelled)), predictor.manifest.preprocessing)
    told: list[tuple[int, int]] = []
    order = np.arange(200)[::-1].copy()
    found = calibrate_bundle(
        predictor, pictures, Settings(), limit=150, order=order, progress=lambda *counts: told.append(counts)
    )
    whole = look(predictor, pictures, Settings().mixture, order=order, limit=150, shifted=False)
    assert found.manifest.guarantees is not None
    assert (len(found.tuning), len(found.calibration), found.manifest.guarantees.pictures) == (37, 113, 113)
    energy = np.concatenate([found.tuning.statistics.energy, found.calibration.statistics.energy])
    assert (energy == whole.statistics.energy).all()
    assert found.tuning.shifted is not None
    assert found.calibration.shifted is None
    assert told == [(37, 150), (150, 150)]


def test_the_date_is_that_of_the_source_where_one_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    assert today() == "2001-09-09"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(ConfigError, match="SOURCE_DATE_EPOCH=yesterday: no whole number"):
        today()
