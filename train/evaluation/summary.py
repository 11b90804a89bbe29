"""Several evaluations of one recipe, say of three seeds, as one table: mean and spread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from trivium.runtime.errors import ConfigError

from .results import Answerer, Results

DEFAULT = "default router"


class Spread(NamedTuple):
    """Mean, sample standard deviation (None of one run), and the values by run."""

    mean: float
    deviation: float | None
    values: list[float]

    def points(self, signed: bool = False) -> str:
        """In percent, or percentage points."""
        mean = f"{100 * self.mean:+.1f}" if signed else f"{100 * self.mean:.1f}"
        return mean if self.deviation is None else f"{mean} ± {100 * self.deviation:.1f}"


MEASURES: dict[str, Callable[[Answerer], float | None]] = {
    "clean accuracy": lambda a: a.accuracy.clean,
    "corrupted accuracy": lambda a: a.accuracy.corrupted,
    "clean over original": lambda a: a.over_original.clean.mean if a.over_original else None,
    "corrupted over original": lambda a: a.over_original.corrupted.mean if a.over_original else None,
    "negative flips, clean": lambda a: a.negative_flips.clean if a.negative_flips else None,
    "negative flips, corrupted": lambda a: a.negative_flips.corrupted if a.negative_flips else None,
    "ECE, clean": lambda a: a.ece.clean,
    "ECE, corrupted": lambda a: a.ece.corrupted,
    "accuracy at 80 %, clean": lambda a: a.accuracy_at_80.clean,
    "accuracy at 80 %, corrupted": lambda a: a.accuracy_at_80.corrupted,
}
"""Name -> a share of one answerer; None where there was no original."""


def summarise(runs: Sequence[Results]) -> dict[str, dict[str, Spread]]:
    """Answerer -> measure -> spread over runs. The row "default router" takes each run's own default.

    Raises: ConfigError where the runs do not measure the same thing.
    """
    if not runs:
        raise ConfigError("no results to sum up")
    first = runs[0]
    for run in runs[1:]:
        for what in ("left_out", "severities"):
            if getattr(run, what) != getattr(first, what):
                raise ConfigError(f"the runs differ in {what}: {getattr(first, what)} and {getattr(run, what)}")
        if [each.name for each in run.answerers] != [each.name for each in first.answerers]:
            raise ConfigError("the runs differ in their heads or routers")
        if run.data != first.data:
            raise ConfigError("the runs were evaluated on different data")
    rows = {each.name: [run.answerer(each.name) for run in runs] for each in first.answerers}
    rows[DEFAULT] = [run.default for run in runs]
    return {
        name: {measure: found for measure, of in MEASURES.items() if (found := spread([of(a) for a in answerers]))}
        for name, answerers in rows.items()
    }


def spread(values: Sequence[float | None]) -> Spread | None:
    """Mean and sample standard deviation; None where a value is missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return Spread(float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else None, known)


def document(runs: Sequence[Results]) -> dict[str, Any]:
    """The summary as plain JSON: seeds, default routers, and mean, deviation and values of each measure."""
    return {
        "format": "trivium-summary",
        "seeds": [run.seed for run in runs],
        "default_routers": [run.model.default_router for run in runs],
        "pictures": runs[0].data.pictures,
        "corrupted": runs[0].data.corrupted,
        "answerers": {
            name: {measure: found._asdict() for measure, found in measures.items()}
            for name, measures in summarise(runs).items()
        },
    }
