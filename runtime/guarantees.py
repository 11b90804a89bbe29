"""What a bundle promises of its answers: the numbers that calibration found, and what they say of one answer.

Prediction sets by split conformal prediction (Sadinle et al. 2019; Romano et al. 2020; Angelopoulos et al. 2021) and
abstention by Learn-then-Test (Angelopoulos et al. 2021). All of it holds for pictures that are exchangeable with the
calibration pictures, whose mixture is part of the record.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from .values import Finite, Name, Positive, Share, Strict

ShiftFeature = Literal["divergence", "mutual_information", "energy"]
SetScore = Literal["lac", "raps"]
Confidence = Literal["max_probability", "predictive_entropy", "mutual_information"]
Open = Annotated[float, Field(gt=0, lt=1)]
DriftStatistic = Literal["predictive_entropy", "mutual_information", "divergence", "energy", "class_id"]


class ShiftDetector(Strict):
    """Logistic on log-scaled scores: how probable it is that a picture is unlike the clean calibration pictures."""

    weights: dict[ShiftFeature, Finite]
    center: dict[ShiftFeature, Finite]
    scale: dict[ShiftFeature, Positive]
    intercept: Finite

    @model_validator(mode="after")
    def _has_all(self) -> ShiftDetector:
        if not self.weights.keys() == self.center.keys() == self.scale.keys():
            raise ValueError("weights, center and scale must name the same scores")
        return self


class RouterGuarantees(Strict):
    """The thresholds of one router's answers."""

    lac: list[Share]
    """For each of `coverages`: a class belongs to the set where 1 - its probability is at most this."""
    raps: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    """For each of `coverages`: a class belongs to the set where its regularised cumulative probability is at most
    this."""
    confidence: Confidence
    """What an answer is ranked by: the one that told errors best on calibration pictures not used for the promise."""
    least: list[Finite | None]
    """For each of `risks`: the least confidence (for the last two: less nats) at which an answer is given; None where
    no threshold could be certified."""


class DriftReference(Strict):
    """Histograms of calibration pictures that a server compares its own with.

    The edges should be of other pictures than those counted: then a count is exchangeable with a server's pictures, and
    its sequential test exact.
    """

    pictures: Annotated[int, Field(ge=1, le=10**12)]
    edges: dict[DriftStatistic, list[Finite]]
    """Inner edges, ascending, of each statistic's bins: B - 1 of them; class_id has none, its bins are the classes."""
    counts: dict[DriftStatistic, list[Annotated[int, Field(ge=0)]]]
    """Pictures in each bin; a value equal to an edge counts below it. Entropy, information and energy are of the head
    `head`; divergence is symmetrised, between clean and robust; class_id is what the default router answered."""
    head: Name

    @model_validator(mode="after")
    def _consistent(self) -> DriftReference:
        if not self.counts or self.edges.keys() != self.counts.keys() - {"class_id"}:
            raise ValueError("every statistic but class_id needs edges and counts")
        for name, counts in self.counts.items():
            if sum(counts) != self.pictures:
                raise ValueError(f"the counts of {name} do not sum to the {self.pictures} pictures")
            edges = self.edges.get(name, [])
            if name != "class_id" and len(counts) != len(edges) + 1:
                raise ValueError(f"{name} needs one count more than edges")
            if any(b < a for a, b in pairwise(edges)):
                raise ValueError(f"the edges of {name} must ascend")
        return self


class Guarantees(Strict):
    """What `trivium calibrate` found, for every router of the bundle."""

    mixture: dict[str, Share]
    """Share of each kind of calibration picture, say {"clean": 0.5, "corrupted": 0.5}."""
    pictures: Annotated[int, Field(ge=1)]
    """Calibration pictures that the thresholds rest on."""
    tuning_pictures: Annotated[int, Field(ge=1)]
    """Further ones, on which all was chosen that had to be chosen before."""
    data: str
    """Where they came from, in words."""
    seed: int
    date: Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$")]
    coverages: Annotated[list[Open], Field(min_length=1, max_length=100)]
    """Ascending."""
    coverage: Open
    """Of the sets where a request names none; one of `coverages`."""
    score: SetScore
    """By which a server builds sets."""
    raps_penalty: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """lambda of RAPS, for each rank beyond `raps_free_ranks`; 0 makes it APS."""
    raps_free_ranks: Annotated[int, Field(ge=0)]
    """k_reg of RAPS."""
    delta: Open
    """Probability, over calibration pictures, that a bound on risk or harm does not hold."""
    risks: Annotated[list[Open], Field(min_length=1, max_length=100)]
    """Ascending: bounds on the share of errors among the pictures answered."""
    max_risk: Open | None
    """Where a request names none; one of `risks`, or None: then nothing is abstained from."""
    routers: Annotated[dict[Name, RouterGuarantees], Field(min_length=1)]
    shift: ShiftDetector
    drift: DriftReference

    @model_validator(mode="after")
    def _consistent(self) -> Guarantees:
        for name in ("coverages", "risks"):
            levels = getattr(self, name)
            if any(b <= a for a, b in pairwise(levels)):
                raise ValueError(f"{name} must ascend")
        if self.coverage not in self.coverages:
            raise ValueError("coverage is none of coverages")
        if self.max_risk is not None and self.max_risk not in self.risks:
            raise ValueError("max_risk is none of risks")
        for router, own in self.routers.items():
            if not len(own.lac) == len(own.raps) == len(self.coverages) or len(own.least) != len(self.risks):
                raise ValueError(f"the thresholds of {router} are not one a level")
        return self
