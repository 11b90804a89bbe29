"""guarantees.json: what a verification found, typed. Shares, coverages, risks and accuracies lie in [0, 1]."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from trivium.runtime.errors import ConfigError
from trivium.runtime.guarantees import Confidence, SetScore

from ..evaluation.results import Diagram, Section
from .calibrate import Settings

Mixture = Literal["declared", "clean", "shifted", "unseen"]
"""The declared mixture, its clean pictures, its others, and corruptions that calibration never draws."""
SLACK = 0.02
"""How far below the promise the coverage of a finite test part may fall before a split counts as bad."""


class CoverageRow(Section):
    """Prediction sets of one promised coverage, on the test part of every split."""

    promised: float
    mean: float
    low: float
    """2.5 % of the splits are below this, 2.5 % above `high`."""
    high: float
    kept: float
    """Share of the splits whose coverage is above the promise less SLACK."""
    size: float
    """Classes in a set, mean."""


class RiskRow(Section):
    """Abstention at one bound on the error among answers."""

    max_risk: float
    """Of the bundle's own, which differs between splits, the mean."""
    certified: float
    """Share of the splits in which a request for it is served at all."""
    answered: float | None
    """Share of the test part, mean over these splits."""
    risk: float | None
    """Error among the answers, likewise."""
    broken_test: float
    """Share of all splits in which the test part's error among answers exceeds the bound: the sampling noise of the
    test part comes on top of what is promised."""
    broken: float
    """Share of all draws (with replacement, from a population that is known whole) in which the population's does: this
    is what delta bounds."""


class HarmRow(Section):
    """The guard, on the test part of every split."""

    base: str
    offered: float
    """Share of the splits in which any threshold was certified; all else is of these."""
    moved: float
    """Share of pictures that the base router answers."""
    accuracy_loss: float
    accuracy_loss_bound: float
    negative_flips: float
    negative_flips_bound: float
    base_negative_flips: float
    """Those of the base router without a guard."""
    accuracy: dict[str, float]
    """Of the clean head, the base router and the guard, on the declared mixture."""
    broken_test: float
    """As in RiskRow, of either bound."""
    broken: float


class RouterRow(Section):
    """One router's promises."""

    accuracy: float
    coverage: dict[SetScore, list[CoverageRow]]
    risks: list[RiskRow]
    errors: dict[Confidence, float]
    """AUROC for errors on the declared mixture, by each confidence."""
    chosen: dict[Confidence, float]
    """Share of the splits in which answers are ranked by it."""


class Removed(Section):
    """Share of the errors that are avoided by abstaining on the least sure fifth."""

    declared: float
    unseen: float
    """On a mix of the same clean pictures and corruptions that calibration never draws."""


class ShiftFound(Section):
    """How well shift_score tells clean pictures from the same pictures shifted, in AUROC, mean over the splits."""

    calibrated: float
    """Shifted as calibration shifts, other pictures."""
    unseen: float
    """By corruptions that calibration never draws."""
    kinds: dict[str, float]
    reliability: Diagram
    """Of the score, against the share of shifted views at even odds, clean and unseen."""
    ece: float


class ConditionRow(Section):
    """Promises asked to hold where the pictures are of another mixture than those of calibration."""

    router: str
    calibrated_on: Mixture
    asked_about: Mixture
    coverage: dict[str, float]
    """Promised -> measured, mean over the splits."""
    size: float
    """At the bundle's own coverage."""
    answered: float | None
    """At the bundle's own bound on risk; None where it was never certified."""
    risk: float | None


class Verified(Section):
    """Everything that one verification found."""

    format: Literal["trivium-guarantees-verified"] = "trivium-guarantees-verified"
    schema_version: Literal[1] = 1
    command: str
    model: str
    router: str
    """The default one."""
    classes: int
    data: dict[str, int]
    """Part of the pool -> its pictures."""
    settings: Settings
    splits: int
    share: float
    """Of the pool that calibrates."""
    tuning: int
    calibration: int
    test: int
    allowed: float
    """delta and two standard errors of a rate of delta over so many splits."""
    routers: dict[str, RouterRow]
    own: RiskRow | None
    """At the bundle's own bound; None where it never had one."""
    harm: HarmRow | None
    removed: Removed
    shift: ShiftFound
    conditions: list[ConditionRow]

    def row(self, router: str, score: SetScore, promised: float) -> CoverageRow:
        return next(row for row in self.routers[router].coverage[score] if abs(row.promised - promised) < 1e-9)

    def worst(self) -> tuple[float, float]:
        """The highest rates of broken bounds on risk over all routers and levels: (on the test part, of the
        population)."""
        rows = [row for router in self.routers.values() for row in router.risks]
        return max(row.broken_test for row in rows), max(row.broken for row in rows)


def write_verified(found: Verified, path: Path) -> None:
    """Raises: OSError."""
    path.write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_verified(path: Path) -> Verified:
    """Raises: ConfigError in one line where it is not what verify-guarantees wrote."""
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
        return Verified.model_validate(document)
    except (OSError, ValueError, ValidationError) as error:
        why = getattr(error, "strerror", None) or "not what trivium verify-guarantees writes"
        raise ConfigError(f"{path}: {why}") from None
