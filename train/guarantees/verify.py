"""Verification: what repeated calibrations came to, against what they promised."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Literal

import numpy as np

from trivium.kernels import HeadStatistics
from trivium.runtime.bundle import Manifest

from ..evaluation import metrics
from ..evaluation.results import Diagram, short
from .calibrate import CONFIDENCES, Settings
from .conformal import Floats
from .pool import Pool
from .trials import DRAW, SCORES, SPLIT, Answers, Record, Trials, answers_of
from .verified import (
    SLACK,
    ConditionRow,
    CoverageRow,
    HarmRow,
    Mixture,
    Removed,
    RiskRow,
    RouterRow,
    ShiftFound,
    Verified,
)

SPLITS = 200
SHARE = 0.3
"""Of the pool that calibrates: the larger the test part, the less its own noise hides what is promised."""
SHOWN = (0.9, 0.95)
"""Coverages that are reported of every router; of the default one all are."""
SHOWN_RISKS = (0.02, 0.05, 0.1, 0.2)
"""Likewise."""
ANSWERED = 0.8
MIXTURES: tuple[Mixture, ...] = ("declared", "clean", "shifted", "unseen")


def verify(
    manifest: Manifest,
    pool: Pool,
    settings: Settings,
    *,
    command: str,
    data: Mapping[str, int],
    splits: int = SPLITS,
    share: float = SHARE,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Verified:
    """Repeat calibration on a pool of pictures and measure what its promises came to.

    Args:
        manifest: of the bundle; guarantees that it has play no part.
        settings: what to promise; the pool's declared views must be of their mixture.
        command, data: for the record.
        splits: repetitions of each kind.
        share: of the pool that calibrates, tuning part included.
        progress: told (repetitions done, repetitions in all).

    Raises: ConfigError where the share is too few pictures for the highest coverage, or leaves none to test on.
    """
    trials = Trials(manifest, pool, settings, share)
    trials.run(splits, seed, progress)
    record, default = trials.record, trials.default
    names = [*trials.known, *(["guard"] if record.mean("accuracy", "guard") is not None else [])]
    return Verified(
        command=command,
        model=manifest.name,
        router=default,
        classes=len(manifest.classes),
        data=dict(data),
        settings=settings,
        splits=splits,
        share=share,
        tuning=trials.tuning,
        calibration=trials.used - trials.tuning,
        test=trials.count - trials.used,
        allowed=short(settings.delta + 2 * (settings.delta * (1 - settings.delta) / splits) ** 0.5),
        routers={name: router_row(record, name, name == default, settings) for name in names},
        own=risk_row(record, default, "own") if record.mean(SPLIT, default, "own", "asked") is not None else None,
        harm=harm_row(record, default, settings),
        removed=removed_errors(trials),
        shift=shift_found(trials),
        conditions=condition_rows(record, list(trials.unseen), settings),
    )


def router_row(record: Record, name: str, whole: bool, settings: Settings) -> RouterRow:
    """One router's promises; `whole`: of every level, else of those shown."""
    return RouterRow(
        accuracy=short(record.rate("accuracy", name)),
        coverage={
            score: [
                coverage_row(record.of("coverage", name, score, level), record.of("size", name, score, level), level)
                for level in settings.coverages
                if whole or level in SHOWN
            ]
            for score in SCORES
        },
        risks=[risk_row(record, name, level) for level in settings.risks if whole or level in SHOWN_RISKS],
        errors={kind: short(record.rate("errors", name, kind)) for kind in CONFIDENCES},
        chosen={kind: short(record.rate("chosen", name, kind)) for kind in CONFIDENCES},
    )


def coverage_row(coverage: Floats, size: Floats, promised: float) -> CoverageRow:
    """From one value a split."""
    low, high = np.quantile(coverage, [0.025, 0.975])
    return CoverageRow(
        promised=promised,
        mean=short(coverage.mean()),
        low=short(low),
        high=short(high),
        kept=short((coverage > promised - SLACK).mean()),
        size=short(size.mean()),
    )


def risk_row(record: Record, name: str, key: float | Literal["own"]) -> RiskRow:
    """One bound on risk, or the bundle's own."""
    asked = record.mean(SPLIT, name, "own", "asked") if key == "own" else key
    assert asked is not None
    return RiskRow(
        max_risk=short(asked),
        certified=short((~np.isnan(record.of(SPLIT, name, key, "risk"))).mean()),
        answered=optional(record.mean(SPLIT, name, key, "answered")),
        risk=optional(record.mean(SPLIT, name, key, "risk")),
        broken_test=short(record.rate(SPLIT, name, key, "broken")),
        broken=short(record.rate(DRAW, name, key, "broken")),
    )


def harm_row(record: Record, base: str, settings: Settings) -> HarmRow | None:
    """The guard; None where none was ever certified."""

    def mean(*key: Hashable) -> float:
        return short(record.rate(*key))

    if not record.rate(SPLIT, "harm", "offered"):
        return None
    return HarmRow(
        base=base,
        offered=mean(SPLIT, "harm", "offered"),
        moved=mean(SPLIT, "harm", "moved"),
        accuracy_loss=mean(SPLIT, "harm", "accuracy_loss"),
        accuracy_loss_bound=settings.accuracy_loss,
        negative_flips=mean(SPLIT, "harm", "negative_flips"),
        negative_flips_bound=settings.negative_flips,
        base_negative_flips=mean(SPLIT, "harm", "base_flips"),
        accuracy={name: mean("accuracy", name) for name in dict.fromkeys(("clean", base, "guard"))},
        broken_test=mean(SPLIT, "harm", "broken"),
        broken=mean(DRAW, "harm", "broken"),
    )


def removed_errors(trials: Trials) -> Removed:
    """What abstaining on the least sure fifth removes, ranked by the confidence chosen most often."""
    pool, default = trials.pool, trials.default
    kind = max(CONFIDENCES, key=lambda each: trials.record.rate("chosen", default, each))

    def removed(answers: Answers) -> float:
        surest = np.argsort(-answers.confidence[kind], kind="stable")[: round(ANSWERED * len(answers.wrong))]
        return short(1 - answers.wrong[surest].sum() / max(1, answers.wrong.sum()))

    mixed = HeadStatistics(
        *(
            np.where(trials.is_clean.reshape(-1, *[1] * (clean.ndim - 1)), clean, unseen)
            for clean, unseen in zip(pool.declared.clean, pool.unseen, strict=True)
        )
    )
    unseen = answers_of(default, trials.manifest, mixed, trials.labels, trials.settings)
    return Removed(declared=removed(trials.known[default]), unseen=removed(unseen))


def shift_found(trials: Trials) -> ShiftFound:
    """How well the shift score did."""
    record = trials.record
    scores, shifted = (np.concatenate(column) for column in zip(*trials.scored, strict=True))
    diagram = metrics.reliability(scores, shifted)
    kinds = sorted(set(trials.pool.unseen_kind.tolist()))
    return ShiftFound(
        calibrated=short(record.rate("shift", "calibrated")),
        unseen=short(record.rate("shift", "unseen")),
        kinds={kind: short(record.rate("shift", "kind", kind)) for kind in kinds},
        reliability=Diagram(
            edges=[short(edge) for edge in diagram.edges],
            counts=diagram.counts.tolist(),
            confidence=[None if np.isnan(value) else short(value) for value in diagram.confidence],
            accuracy=[None if np.isnan(value) else short(value) for value in diagram.accuracy],
        ),
        ece=short(metrics.calibration_error(diagram)),
    )


def condition_rows(record: Record, routers: list[str], settings: Settings) -> list[ConditionRow]:
    """Every router, mixture calibrated on and mixture asked about for which there were pictures enough."""
    rows = []
    calibrated: tuple[Mixture, ...] = ("declared", "clean")
    for router in routers:
        for on in calibrated:
            for about in MIXTURES:
                key = ("condition", router, on, about)
                size = record.mean(*key, "size", settings.coverage)
                if size is None:
                    continue
                levels = sorted({*SHOWN, settings.coverage})
                rows.append(
                    ConditionRow(
                        router=router,
                        calibrated_on=on,
                        asked_about=about,
                        coverage={f"{level:g}": short(record.rate(*key, "coverage", level)) for level in levels},
                        size=short(size),
                        answered=optional(record.mean(*key, "answered")),
                        risk=optional(record.mean(*key, "risk")),
                    )
                )
    return rows


def optional(value: float | None) -> float | None:
    return None if value is None else short(value)
