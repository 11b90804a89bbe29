"""Sets, abstentions and shift scores against float64 computed picture by picture, class by class, from their text."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.conftest import HEADS, tiny_guarantees, tiny_manifest

from trivium.kernels import HeadStatistics
from trivium.runtime.bundle import Manifest
from trivium.runtime.errors import InvalidRequest
from trivium.runtime.guarantees import Guarantees, ShiftFeature
from trivium.runtime.predictor import Predictor
from trivium.runtime.promises import (
    PROMISED,
    abstentions,
    check,
    confidence,
    conformity_scores,
    coverage_level,
    least_probability,
    number,
    prediction_sets,
    ranges,
    risk_level,
    shift_scores,
    terms,
)
from trivium.runtime.router import route

ROUTERS = (*HEADS, "mean", "min_entropy", "paper", "blend", "guard")
BLEND = tiny_manifest().model_dump()["router"]["blend"]
GUARD = BLEND | {"base": "blend", "accuracy_loss": 0.01, "negative_flips": 0.01, "delta": 0.05, "threshold": 0.4}


def manifest(classes: int = 10, **changes: Any) -> Manifest:
    """Of a bundle with guarantees for every rule, the guard's too."""
    router = tiny_manifest().model_dump()["router"] | {"guard": GUARD}
    return tiny_manifest(classes=classes, router=router, guarantees=tiny_guarantees(ROUTERS, classes, **changes))


def guarantees(**changes: Any) -> Guarantees:
    return Guarantees.model_validate(tiny_guarantees(**changes))


def statistics(count: int, classes: int = 10, seed: int = 5) -> HeadStatistics:
    """Drawn ones, with zeros and equals among the probabilities."""
    rng = np.random.default_rng(seed)
    coarse = np.floor(rng.dirichlet(np.full(classes, 0.4), (count, 3)) * 64).astype(np.float32)
    coarse[..., 0] += 64 - coarse.sum(2)
    return HeadStatistics(
        coarse / np.float32(64),
        rng.gamma(2, 0.7, (count, 3)).astype(np.float32),
        rng.gamma(2, 0.5, (count, 3)).astype(np.float32),
        rng.gamma(1, 0.4, (count, 3, 3)).astype(np.float32),
        rng.normal(-10, 2, (count, 3)).astype(np.float32),
    )


def row(stats: HeadStatistics, place: int) -> HeadStatistics:
    return HeadStatistics(*(values[place : place + 1] for values in stats))


def expected_set(p: list[float], answer: int, found: Guarantees, quantile: float) -> list[bool]:
    if found.score == "lac":
        return [label == answer or 1 - one <= quantile for label, one in enumerate(p)]
    order = sorted(range(len(p)), key=lambda label: (-p[label], label))
    total, inside = 0.0, [False] * len(p)
    for rank, label in enumerate(order, 1):
        total += p[label]
        inside[label] = total + found.raps_penalty * max(0, rank - found.raps_free_ranks) <= quantile
    inside[answer] = True
    return inside


def expected_confidence(kind: str, p: list[float], information: list[float], head: str, m: Manifest) -> float:
    if kind == "max_probability":
        return max(p)
    if kind == "predictive_entropy":
        return sum(one * math.log(one) for one in p if one > 0)
    parts = {"mean": list(HEADS)}.get(head, head.split("+"))
    return -sum(information[m.heads.index(part)] for part in parts) / len(parts)


@pytest.mark.parametrize("score", ["lac", "raps"])
@pytest.mark.parametrize("classes", [2, 10, 137])
def test_every_router_s_answers_keep_its_own_thresholds(score: str, classes: int) -> None:
    m = manifest(classes, score=score)
    found = m.guarantees
    assert found is not None
    stats = statistics(61, classes)
    seen: dict[str, set[Any]] = {"sizes": set(), "abstain": set()}
    for router in ROUTERS:
        own = found.routers[router]
        routed = route(stats, m, router)
        for level, coverage in enumerate(found.coverages):
            asked = terms(m, router, coverage)
            assert asked is not None
            sets = prediction_sets(routed, found, asked.quantile)
            assert sets.dtype == np.bool_
            assert sets.shape == (61, classes)
            for place, answer in enumerate(routed.class_id.tolist()):
                exact = [float(one) for one in routed.probabilities[place]]
                quantile = getattr(own, score)[level]
                assert sets[place].tolist() == expected_set(exact, answer, found, quantile)
            seen["sizes"] |= set(sets.sum(1).tolist())
        for level, least in enumerate(own.least):
            if least is None:
                continue
            asked = terms(m, router, max_risk=found.risks[level])
            assert asked is not None
            abstain = abstentions(routed, stats, m, asked)
            ranked = confidence(routed, stats, m, own.confidence)
            for place in range(61):
                exact = [float(one) for one in routed.probabilities[place]]
                information = [float(one) for one in stats.mutual_information[place]]
                value = expected_confidence(own.confidence, exact, information, routed.head[place], m)
                assert ranked[place] == pytest.approx(value, rel=1e-14, abs=1e-15)
                assert abs(value - least) > 1e-12
                assert abstain[place] == (value < least)
            seen["abstain"] |= set(abstain.tolist())
    assert len(seen["sizes"]) > 1
    assert seen["abstain"] == {True, False}


@pytest.mark.parametrize("score", ["lac", "raps"])
def test_a_set_is_what_the_calibrated_score_says(score: Any) -> None:
    found = guarantees(score=score)
    routed = route(statistics(200), manifest(), "blend")
    scores = conformity_scores(routed.probabilities, routed.class_id, score, found.raps_penalty, found.raps_free_ranks)
    assert (scores[np.arange(200), routed.class_id] == -np.inf).all()
    # quantiles that are scores: the class that has one is within
    for quantile in (0.0, *np.unique(scores[scores >= 0]).tolist(), 1.0):
        np.testing.assert_array_equal(prediction_sets(routed, found, quantile), scores <= quantile)


def test_raps_ranks_by_probability_and_then_by_number() -> None:
    p = np.array([[0.25, 0.125, 0.25, 0.375, 0.0]], np.float32)
    answer = np.array([3])
    aps = conformity_scores(p, answer, "raps", 0.0, 0)
    assert aps.tolist() == [[0.625, 1.0, 0.875, -math.inf, 1.0]]
    raps = conformity_scores(p, answer, "raps", 0.5, 2)
    assert raps.tolist() == [[0.625, 2.0, 1.375, -math.inf, 2.5]]
    assert conformity_scores(p, answer, "lac", 0.5, 2).tolist() == [[0.75, 0.875, 0.75, -math.inf, 1.0]]


def test_the_least_probability_is_the_first_that_passes() -> None:
    rng = np.random.default_rng(1)
    one = np.float32(1)
    for quantile in (0.0, 2.0**-25, 0.5, 0.9, 1 - 2.0**-30, 1 - 2.0**-53, *rng.uniform(0, 1, 50).tolist()):
        least = least_probability(quantile)
        assert least.dtype == np.float32
        assert 1 - float(least) <= quantile
        assert not 1 - float(np.nextafter(least, -one)) <= quantile
    assert least_probability(1.0) == 0


@pytest.mark.parametrize("router", ROUTERS)
def test_a_promise_does_not_depend_on_the_batch(router: str) -> None:
    for score in ("lac", "raps"):
        m, stats = manifest(37, score=score), statistics(130, 37)
        found = m.guarantees
        assert found is not None

        def all_three(some: HeadStatistics, m: Manifest = m, found: Guarantees = found) -> list[NDArray[Any]]:
            asked = terms(m, router)
            assert asked is not None
            routed = route(some, m, router)
            return [
                prediction_sets(routed, found, asked.quantile),
                abstentions(routed, some, m, asked),
                shift_scores(some, found, m.heads),
                *(confidence(routed, some, m, own.confidence) for own in found.routers.values()),
            ]

        whole = all_three(stats)
        for place in range(130):
            for one, among in zip(all_three(row(stats, place)), whole, strict=True):
                np.testing.assert_array_equal(one[0], among[place])


def test_the_shift_score_is_the_detector_s_probability() -> None:
    m = manifest()
    found = m.guarantees
    assert found is not None
    stats = statistics(40)
    scores = shift_scores(stats, found, m.heads)
    assert scores.dtype == np.float32
    clean, robust = m.heads.index("clean"), m.heads.index("robust")
    for place in range(40):
        divergence, information = stats.divergence[place].astype(float), stats.mutual_information[place].astype(float)
        value: dict[ShiftFeature, float] = {
            "divergence": math.log(1e-4 + (divergence[clean, robust] + divergence[robust, clean]) / 2),
            "mutual_information": math.log(1e-4 + information[clean]),
            "energy": float(stats.energy[place, clean]),
        }
        shift = found.shift
        logit = shift.intercept + sum(shift.weights[k] * (value[k] - shift.center[k]) / shift.scale[k] for k in value)
        assert scores[place] == pytest.approx(1 / (1 + math.exp(-logit)), rel=1e-6)


def test_levels_between_those_of_the_grid_are_rounded_to_the_safe_side() -> None:
    found = guarantees()
    assert [coverage_level(found, one) for one in (0.8, 0.8001, 0.9, 0.95, 0.951, 0.99)] == [0, 1, 1, 2, 3, 3]
    # certified: 0.05, 0.2 and 0.3
    asked = (0.05, 0.06, 0.1, 0.15, 0.2, 0.25, 0.3)
    assert [risk_level(found, "clean", one) for one in asked] == [1, 1, 1, 1, 3, 3, 4]
    with pytest.raises(InvalidRequest, match=r"^parameter 'coverage' must be from 0.8 to 0.99, got 1$"):
        coverage_level(found, 1.0)
    for wrong in (0.0, 0.7999, 0.991, -0.9, math.inf, math.nan):
        with pytest.raises(InvalidRequest, match=r"'coverage' must be from 0.8 to 0.99"):
            coverage_level(found, wrong)
    for wrong in (0.0, 0.01, 0.0499, 0.31, -0.1, math.inf, math.nan):
        with pytest.raises(InvalidRequest, match=r"'max_risk' must be from 0.05 to 0.3 for router 'clean'"):
            risk_level(found, "clean", wrong)


def test_defaults() -> None:
    m = manifest()
    assert m.guarantees is not None
    own = m.guarantees.routers["robust"]
    assert terms(m, "robust") == (own.lac[1], own.confidence, own.least[3], PROMISED, 0.9, 0.2)
    assert terms(m) == terms(m, "blend") != terms(m, "robust")
    # certified for no level up to the bundle's own, which is then kept by giving no answer
    strict = manifest(max_risk=0.01)
    stats = statistics(9)
    asked = terms(strict, "clean")
    assert asked is not None
    assert asked.least == math.inf
    assert abstentions(route(stats, strict, "clean"), stats, strict, asked).all()
    offered = ranges(m)
    assert offered is not None
    assert offered["risks"]["clean"] == [0.05, 0.3]
    assert ranges(tiny_manifest()) is None
    free = manifest(max_risk=None)
    asked = terms(free, "clean")
    assert asked is not None
    assert not abstentions(route(stats, free, "clean"), stats, free, asked).any()


def refusal(ask: Callable[..., Any], *arguments: Any) -> str:
    try:
        ask(*arguments)
    except InvalidRequest as error:
        return str(error)
    return ""


def test_a_client_knows_what_a_model_would_refuse() -> None:
    document = tiny_guarantees()
    document["routers"]["mean"]["least"] = [None] * 5
    m = tiny_manifest(guarantees=document)
    for router in (None, "mean", "clean"):
        for coverage in (None, 0.9, 1.0, math.nan):
            for max_risk in (None, 0.05, 0.2, 0.31, math.nan):
                levels = (router, coverage, max_risk)
                assert refusal(terms, m, *levels) == refusal(check, ranges(m), m.name, *levels)
    with pytest.raises(InvalidRequest, match="no 'max_risk' can be kept: none was certified for router 'mean'"):
        terms(m, "mean", max_risk=0.3)


def test_without_guarantees_nothing_can_be_asked() -> None:
    assert terms(tiny_manifest()) is None
    for name in ("coverage", "max_risk"):
        levels: dict[str, Any] = {name: 0.9}
        with pytest.raises(InvalidRequest, match=f"parameter '{name}' cannot be used .*run: trivium calibrate BUNDLE"):
            terms(tiny_manifest(), **levels)
        with pytest.raises(InvalidRequest, match=r"run: trivium calibrate BUNDLE"):
            check(None, "tiny", None, levels.get("coverage"), levels.get("max_risk"))
    with pytest.raises(InvalidRequest, match="unknown router 'x'; this model has: clean"):
        terms(manifest(), "x")


def test_numbers() -> None:
    assert [number("coverage", one) for one in (0.9, 1, "0.95", " 9e-1 ")] == [0.9, 1.0, 0.95, 0.9]
    for wrong in ("high", "", None, True, [0.9], 10**400):
        with pytest.raises(InvalidRequest, match=r"^parameter 'coverage' must be a number, got "):
            number("coverage", wrong)


def test_the_predictor_looks_up_what_is_asked(
    guaranteed_bundle: Path, tiny_bundle: Path, some_pictures: NDArray[np.uint8]
) -> None:
    plain = Predictor.load(tiny_bundle).infer(some_pictures[0])
    assert plain.prediction_set is plain.abstain is plain.shift_score is None
    predictor = Predictor.load(guaranteed_bundle)
    whole = predictor.infer(some_pictures[0])
    assert whole.prediction_set is not None
    assert whole.prediction_set[whole.class_id]
    assert isinstance(whole.abstain, bool)
    assert isinstance(whole.shift_score, float)
    np.testing.assert_array_equal(whole.probabilities, plain.probabilities)
    asked = terms(predictor.manifest, outputs=("label", "abstain"))
    part = predictor.infer(some_pictures[0], asked=asked)
    assert (part.prediction_set, part.abstain, part.shift_score) == (None, whole.abstain, None)
    sizes = []
    for coverage in (0.8, 0.9, 0.95, 0.99):
        found = [
            predictor.infer(one, asked=terms(predictor.manifest, coverage=coverage)).prediction_set
            for one in some_pictures
        ]
        sizes.append(sum(int(one.sum()) for one in found if one is not None))
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
