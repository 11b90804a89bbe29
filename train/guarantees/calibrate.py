"""What a bundle may promise: thresholds of sets and abstention for every router, a guard, a shift detector.

The calibration pictures are parted at random: what has to be chosen is chosen on the tuning part, a quarter, and the
promises rest on the other part alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from trivium.kernels import HeadStatistics
from trivium.runtime.bundle import GuardRule, Manifest
from trivium.runtime.errors import ConfigError
from trivium.runtime.guarantees import Confidence, Guarantees, RouterGuarantees, SetScore
from trivium.runtime.predictor import Predictor
from trivium.runtime.promises import confidence, conformity_scores
from trivium.runtime.router import Routed, route, shift_probability

from ..calibration.calibrate import drawn
from ..calibration.observe import CLEAN
from ..data.pictures import Pictures
from ..evaluation.tally import labels_for
from ..sections import NonNegative, Section, Share
from .conformal import Floats, least_pictures, quantiles
from .drift_reference import drift_reference
from .harm import certify_guard
from .selective import certify, choose_confidence
from .shift import fit_detector
from .views import Views, look

COVERAGES = tuple(percent / 100 for percent in range(80, 100))
RISKS = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.10, 0.125, 0.15, 0.20, 0.25, 0.30, 0.40, 0.50)
TUNING_SHARE = 1 / 4
ANSWERED = 0.8
"""Share of the tuning pictures that the bundle's own risk should leave answered."""
GUARD_THRESHOLDS = tuple(1 - step / 100 for step in range(101))
"""From never leaving the clean head to never asking it."""
Part = Annotated[float, Field(gt=0, le=1)]
CONFIDENCES: tuple[Confidence, ...] = get_args(Confidence)


class Settings(Section):
    """What is to be promised, and to which mixture of pictures."""

    mixture: dict[str, Part] = Field(default={CLEAN: 0.5, "corrupted": 0.5})
    """Shares of views.COMPONENTS."""
    coverage: Share = 0.9
    """Of the sets where a request names none."""
    score: SetScore = "lac"
    raps_penalty: NonNegative = 0.01
    """lambda of RAPS; this and 5 free ranks are those of its paper's experiments."""
    raps_free_ranks: Annotated[int, Field(ge=0)] = 5
    """k_reg of RAPS."""
    max_risk: Share | None = None
    """Error among answers that a request tolerates where it names none; None: the least level that, as far as the
    tuning part tells, leaves ANSWERED of the pictures answered."""
    delta: Share = 0.1
    """Probability, over calibration pictures, that a bound on risk or harm does not hold; each by itself."""
    accuracy_loss: Share = 0.01
    """Fall of clean accuracy that a guard may cost."""
    negative_flips: Share = 0.02
    """Share of all pictures that the clean head gets right and a guard may get wrong."""
    drift: Literal["clean", "mixture"] = "clean"
    """Views on which the histograms for a server's drift monitor rest."""
    data: str = ""
    """Where the pictures come from, in words."""
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def coverages(self) -> list[float]:
        return sorted({*COVERAGES, self.coverage})

    @property
    def risks(self) -> list[float]:
        return sorted({*RISKS} if self.max_risk is None else {*RISKS, self.max_risk})


class Calibrated(NamedTuple):
    """A manifest with guarantees, and the views that they rest on."""

    manifest: Manifest
    tuning: Views
    calibration: Views


def calibrate_bundle(
    predictor: Predictor,
    pictures: Pictures,
    settings: Settings,
    *,
    limit: int | None = None,
    order: NDArray[np.int64] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Calibrated:
    """Ask a bundle about calibration pictures and put into its manifest what may be promised.

    The same arguments give the same manifest, but for its date.

    Args:
        limit: pictures used at most.
        order: the pictures, in random order; None: all, drawn by seed.
        progress: told (pictures done, pictures in all).

    Raises: ConfigError where the pictures are too few or of other classes, or where the risk asked for cannot be
        certified; EngineError.
    """
    labels_for(pictures, predictor.manifest.classes)
    if order is None:
        order = drawn(len(pictures), settings.seed)
    order = order[:limit]
    first = tuning_pictures(len(order))
    check_size(len(order) - first, settings)

    def seen(rows: NDArray[np.int64], begun: int, shifted: bool) -> Views:
        def told(done: int, _: int) -> None:
            if progress is not None:
                progress(begun + done, len(order))

        return look(
            predictor, pictures, settings.mixture, seed=settings.seed, order=rows, shifted=shifted, progress=told
        )

    tuning, calibration = seen(order[:first], 0, True), seen(order[first:], first, False)
    guarantees, guard = guarantees_of(predictor.manifest, tuning, calibration, settings)
    manifest = with_guarantees(predictor.manifest, guarantees, guard)
    if settings.max_risk is not None:
        check_risk(guarantees, manifest.router.default, settings.max_risk)
    return Calibrated(manifest, tuning, calibration)


def tuning_pictures(count: int) -> int:
    """How many of so many pictures are for tuning."""
    return int(count * TUNING_SHARE)


def least_in_all(coverage: float) -> int:
    """The fewest pictures of which the calibration part is enough for this coverage."""
    total = wanted = least_pictures(coverage)
    while total - tuning_pictures(total) < wanted:
        total += 1
    return total


def guarantees_of(
    manifest: Manifest, tuning: Views, calibration: Views, settings: Settings
) -> tuple[Guarantees, GuardRule | None]:
    """What may be promised of a bundle's answers, and the guard whose harm was certified, where there is one.

    A guard's harm is certified on the first half of the calibration part, and its own sets and abstention rest on the
    second: its threshold is chosen by labels, so that the pictures it was chosen on are no longer exchangeable with
    others. Nobody else's numbers depend on the calibration part before its quantiles and thresholds are taken from it.

    Args:
        manifest: of the bundle; guarantees and a guard that it has already count for nothing.
        tuning, calibration: disjoint, each in random order; tuning with shifted views.

    Raises: ConfigError where the calibration part is too small.
    """
    check_size(len(calibration), settings)
    assert tuning.shifted is not None, "look gives them unless told otherwise"
    seen = HeadStatistics(*(np.concatenate(pair) for pair in zip(tuning.clean, tuning.shifted, strict=True)))
    detector = fit_detector(seen, np.arange(2 * len(tuning)) >= len(tuning), manifest.heads)
    base = with_guard(manifest, None)
    first, second = slice(len(calibration) // 2), slice(len(calibration) // 2, None)
    guard = None
    if len(calibration) - len(calibration) // 2 >= least_pictures(settings.coverages[-1]):
        rule = GuardRule(
            **detector.model_dump(),
            base=base.router.default,
            threshold=1,
            accuracy_loss=settings.accuracy_loss,
            negative_flips=settings.negative_flips,
            delta=settings.delta,
        )
        guard = certified_guard(base, rule, calibration.take(first))
    whole = with_guard(manifest, guard)
    rows = {
        name: thresholds_of(name, whole, tuning, calibration.take(second) if name == "guard" else calibration, settings)
        for name in whole.routers()
    }
    tuned, counted = (each.clean if settings.drift == "clean" else each.statistics for each in (tuning, calibration))
    guarantees = Guarantees(
        mixture=dict(settings.mixture),
        pictures=len(calibration),
        tuning_pictures=len(tuning),
        data=settings.data,
        seed=settings.seed,
        date=today(),
        coverages=settings.coverages,
        coverage=settings.coverage,
        score=settings.score,
        raps_penalty=settings.raps_penalty,
        raps_free_ranks=settings.raps_free_ranks,
        delta=settings.delta,
        risks=settings.risks,
        max_risk=settings.max_risk or own_risk(whole, tuning, rows[whole.router.default], settings),
        routers=rows,
        shift=detector,
        drift=drift_reference(tuned, counted, whole),
    )
    return guarantees, guard


def certified_guard(manifest: Manifest, rule: GuardRule, views: Views) -> GuardRule | None:
    """The rule at the least threshold whose harm is certified on these views; None where there is none, or where no
    clean head is, or nothing else."""
    if "clean" not in manifest.heads or rule.base == "clean":
        return None
    threshold = certify_guard(
        shift_probability(views.statistics, rule, manifest.heads),
        route(views.statistics, manifest, "clean").class_id == views.labels,
        route(views.statistics, manifest, rule.base).class_id == views.labels,
        views.kind == CLEAN,
        accuracy_loss=rule.accuracy_loss,
        negative_flips=rule.negative_flips,
        delta=rule.delta,
        thresholds=GUARD_THRESHOLDS,
    )
    return None if threshold is None else rule.model_copy(update={"threshold": threshold})


def thresholds_of(
    router: str, manifest: Manifest, tuning: Views, calibration: Views, settings: Settings
) -> RouterGuarantees:
    """The thresholds of one router's sets and abstention."""
    tuned = route(tuning.statistics, manifest, router)
    ranked = {kind: confidence(tuned, tuning.statistics, manifest, kind) for kind in CONFIDENCES}
    tuning_errors = tuned.class_id != tuning.labels
    chosen = choose_confidence(ranked, tuning_errors)
    routed = route(calibration.statistics, manifest, router)
    right = np.arange(len(calibration)), calibration.labels
    return RouterGuarantees(
        lac=quantiles(conformity(routed, settings, "lac")[right], settings.coverages),
        raps=quantiles(conformity(routed, settings, "raps")[right], settings.coverages),
        confidence=chosen,
        least=certify(
            ranked[chosen],
            tuning_errors,
            confidence(routed, calibration.statistics, manifest, chosen),
            routed.class_id != calibration.labels,
            settings.risks,
            settings.delta,
        ),
    )


def conformity(routed: Routed, settings: Settings, score: SetScore) -> Floats:
    """Conformity scores [N, C] of routed answers."""
    return conformity_scores(
        routed.probabilities, routed.class_id, score, settings.raps_penalty, settings.raps_free_ranks
    )


def own_risk(manifest: Manifest, tuning: Views, own: RouterGuarantees, settings: Settings) -> float | None:
    """The least risk that leaves ANSWERED of the pictures answered, for the default router.

    Chosen as if the tuning part were all there is, so that the choice does not bias the promise; a level that then was
    not certified gives way to the next that was. None where there is none.
    """
    routed = route(tuning.statistics, manifest)
    ranked = confidence(routed, tuning.statistics, manifest, own.confidence)
    errors = routed.class_id != tuning.labels
    tuned = certify(ranked, errors, ranked, errors, settings.risks, settings.delta)
    for place, (least, certified) in enumerate(zip(tuned, own.least, strict=True)):
        if least is not None and certified is not None and (ranked >= least).mean() >= ANSWERED:
            return settings.risks[place]
    return None


def with_guard(manifest: Manifest, guard: GuardRule | None) -> Manifest:
    """The manifest with this guard in place of its own; where a guard answered by default and none is left, the router
    that it guarded does."""
    router = manifest.router
    update: dict[str, object] = {"guard": guard}
    if router.default == "guard" and guard is None and router.guard is not None:
        update["default"] = router.guard.base
    return manifest.model_copy(update={"router": router.model_copy(update=update), "guarantees": None})


def with_guarantees(manifest: Manifest, guarantees: Guarantees, guard: GuardRule | None) -> Manifest:
    """The manifest with what guarantees_of found in it."""
    document = with_guard(manifest, guard).model_dump() | {"guarantees": guarantees.model_dump()}
    return Manifest.model_validate(document)


def check_size(pictures: int, settings: Settings) -> None:
    """Raise ConfigError where so many calibration pictures are too few for the highest coverage."""
    highest = settings.coverages[-1]
    if pictures < least_pictures(highest):
        raise ConfigError(
            f"a coverage of {highest:g} needs {least_pictures(highest)} calibration pictures beside the tuning part, "
            f"{least_in_all(highest)} in all; there are {pictures}"
        )


def check_risk(guarantees: Guarantees, router: str, max_risk: float) -> None:
    """Raise ConfigError where this risk could not be certified for a router, with the least that could."""
    certified = certified_risks(guarantees, router)
    if max_risk not in certified:
        least = f"the least that can is {min(certified):g}" if certified else "nor can any other"
        raise ConfigError(
            f"--max-risk {max_risk:g} cannot be certified for router {router} on {guarantees.pictures} calibration "
            f"pictures: {least}"
        )


def certified_risks(guarantees: Guarantees, router: str) -> Sequence[float]:
    """The risks of the grid that were certified for a router, ascending."""
    least = guarantees.routers[router].least
    return [risk for risk, threshold in zip(guarantees.risks, least, strict=True) if threshold is not None]


def today() -> str:
    """The date, of SOURCE_DATE_EPOCH where that is set (reproducible-builds.org), UTC.

    Raises: ConfigError where that is no time.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        moment = datetime.now(UTC) if not epoch else datetime.fromtimestamp(int(epoch), UTC)
    except (ValueError, OverflowError, OSError):
        raise ConfigError(f"SOURCE_DATE_EPOCH={epoch}: no whole number of seconds since 1970") from None
    return f"{moment:%Y-%m-%d}"
