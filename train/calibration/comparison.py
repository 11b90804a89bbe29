"""Routers compared on a declared mixture of clean and corrupted pictures, and the choice among them.

A single head is the null: another router must beat it with confidence, or keep more of the original's right answers at
the same accuracy, and in either case be shown to lose little on every kind of picture, since what a server will meet
is none of these kinds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trivium.runtime.bundle import Dropout, File, Manifest, Preprocessing, RouterSettings
from trivium.runtime.router import route, routers

from ..evaluation.metrics import Interval, paired_bootstrap
from .observe import Observations

Floats = NDArray[np.float64]

COMBINED = "combined"
"""The head trained on clean and shifted pictures alike: the null unless another head surely beats it."""
MARGIN = 0.005
"""Accuracy that a router may lose against the null on the mixture, at most, where it makes fewer negative flips."""
KIND_MARGIN = 0.02
"""Accuracy that it may lose on any one kind of picture; wider, as fewer pictures of each are seen."""


class Candidate(NamedTuple):
    """A router as judged on the mixture; accuracies and flips are shares in [0, 1]."""

    router: str
    accuracy: float
    accuracy_clean: float
    accuracy_shifted: float
    difference: Interval
    """Accuracy less that of the null head."""
    negative_flips: float | None
    """Share of the mixture that the original got right and this router gets wrong."""
    flips_difference: Interval | None
    """Negative flips less those of the null head."""
    may_lose_on: tuple[str, ...] = ()
    """Kinds of pictures on which a loss of more than KIND_MARGIN against the null head is not excluded."""
    beats_heads: bool = True
    """Of a learned gate: whether its accuracy exceeds that of each head with its whole interval."""
    control: bool = False
    """Whether it is here for comparison only, and no router of the model."""

    def row(self) -> dict[str, Any]:
        """As a row of the manifest's calibration record."""
        row: dict[str, Any] = {
            "router": self.router,
            "accuracy": self.accuracy,
            "accuracy_clean": self.accuracy_clean,
            "accuracy_shifted": self.accuracy_shifted,
            "difference": self.difference.mean,
            "difference_low": self.difference.low,
            "difference_high": self.difference.high,
            "may_lose_on": ", ".join(self.may_lose_on),
            "control": self.control,
        }
        if self.negative_flips is not None and self.flips_difference is not None:
            row |= {
                "negative_flips": self.negative_flips,
                "flips_difference": self.flips_difference.mean,
                "flips_difference_low": self.flips_difference.low,
                "flips_difference_high": self.flips_difference.high,
            }
        return {key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()}


def compare_routers(
    observed: Observations,
    manifest: Manifest,
    clean_share: float = 0.5,
    seed: int = 0,
    learned: Mapping[str, NDArray[np.int64]] | None = None,
) -> tuple[str, list[Candidate]]:
    """Judge every router of a manifest on the mixture.

    Clean views share `clean_share` of the weight and corrupted ones the rest. Intervals are 95 % paired bootstraps
    over pictures, all views of one picture together.

    Args:
        learned: class ids [N] of what was learned, each picture answered without its kind of shift having been seen:
            of the router `gate`, in place of the manifest's, and of controls.

    Returns: the null, and one Candidate a router or control. The null is the combined head, unless the most accurate
    head beats it with its whole interval; without a combined head it is the most accurate (of equals: with fewer
    negative flips).
    """
    clean, labels = observed.clean, observed.labels
    learned = learned or {}
    fixed = [name for name in routers(manifest) if name not in learned]
    answers = {name: route(observed.statistics, manifest, name).class_id for name in fixed} | dict(learned)
    right = {name: answered == labels for name, answered in answers.items()}
    score = {name: by_picture(observed, values, clean_share) for name, values in right.items()}
    flips: dict[str, Floats] | None = None
    if observed.original is not None:
        kept = observed.original == labels
        flips = {name: by_picture(observed, kept & ~values, clean_share) for name, values in right.items()}

    def merit(head: str) -> tuple[float, float]:
        return round(float(score[head].mean()), 9), 0.0 if flips is None else -float(flips[head].mean())

    null = max(manifest.heads, key=merit)
    if COMBINED in manifest.heads and paired_bootstrap(score[null] - score[COMBINED], seed=seed).low <= 0:
        null = COMBINED

    def may_lose_on(name: str) -> tuple[str, ...]:
        gain = right[name].astype(np.float64) - right[null]
        kinds = {str(kind): gain[observed.kind == kind] for kind in np.unique(observed.kind)}
        return tuple(kind for kind, gains in kinds.items() if paired_bootstrap(gains, seed=seed).low < -KIND_MARGIN)

    def beats_heads(name: str) -> bool:
        return all(paired_bootstrap(score[name] - score[head], seed=seed).low > 0 for head in manifest.heads)

    rows = [
        Candidate(
            name,
            float(score[name].mean()),
            float(values[clean].mean()) if clean.any() else float("nan"),
            float(values[~clean].mean()) if (~clean).any() else float("nan"),
            paired_bootstrap(score[name] - score[null], seed=seed),
            None if flips is None else float(flips[name].mean()),
            None if flips is None else paired_bootstrap(flips[name] - flips[null], seed=seed),
            may_lose_on(name),
            beats_heads=name not in learned or beats_heads(name),
            control=name not in routers(manifest),
        )
        for name, values in right.items()
    ]
    return null, rows


def mixture_weights(observed: Observations, clean_share: float) -> Floats:
    """[N]: clean views share `clean_share` of the weight and shifted ones the rest."""
    clean = observed.clean
    return np.where(clean, clean_share / max(clean.sum(), 1), (1 - clean_share) / max((~clean).sum(), 1))


def by_picture(observed: Observations, values: NDArray[Any], clean_share: float) -> Floats:
    """[P], whose plain mean is the weighted mean of the views' values [N]."""
    _, unit = np.unique(observed.picture, return_inverse=True)
    return np.asarray(np.bincount(unit, mixture_weights(observed, clean_share) * values) * (unit.max() + 1))


def choose_router(null: str, rows: Sequence[Candidate]) -> tuple[str, str]:
    """The default router and a sentence why.

    The null head answers, unless another router that can lose at most KIND_MARGIN on any kind of picture either beats
    it on the mixture (the interval of its accuracy less the null's lies above 0), or loses at most MARGIN there (the
    interval lies above -MARGIN) and makes significantly fewer negative flips (their interval lies below 0). Of several
    that beat it the most accurate is taken, of several that flip less the one with the fewest flips. A learned gate
    must beat every head, whichever is the null; fewer flips are not enough for it.
    """
    others = [row for row in rows if row.router != null and not row.may_lose_on and row.beats_heads and not row.control]
    better = [row for row in others if row.difference.low > 0]
    if better:
        chosen = max(better, key=lambda row: row.accuracy)
        return chosen.router, f"more accurate on the mixture than the {null} head: {points(chosen.difference)}"
    steadier = [
        row
        for row in others
        if row.difference.low >= -MARGIN and row.flips_difference is not None and row.flips_difference.high < 0
    ]
    if steadier:
        chosen = min(steadier, key=lambda row: (row.negative_flips, -row.accuracy))
        assert chosen.flips_difference is not None
        return chosen.router, (
            f"as accurate as the {null} head ({points(chosen.difference)}), also on each kind of picture, "
            f"with fewer negative flips ({points(chosen.flips_difference)})"
        )
    if len(rows) == 1:
        return null, "the only router of this model"
    return null, (
        f"no other router is shown to be more accurate on the mixture, or as accurate within {100 * MARGIN:g} points "
        f"with fewer negative flips, without a possible loss of {100 * KIND_MARGIN:g} points on some kind of picture"
    )


def points(interval: Interval) -> str:
    """A difference of shares in percentage points, with its interval."""
    return f"{100 * interval.mean:+.2f} points, 95 % interval {100 * interval.low:+.2f} to {100 * interval.high:+.2f}"


def provisional(
    classes: Sequence[str],
    heads: Sequence[str],
    preprocessing: Preprocessing,
    dropout: Dropout,
    settings: RouterSettings | None = None,
    name: str = "model",
) -> Manifest:
    """A manifest of a model that is in no bundle yet, for the runtime's router; without settings the first head
    answers."""
    return Manifest(
        name=name,
        classes=list(classes),
        heads=list(heads),
        preprocessing=preprocessing,
        dropout=dropout,
        router=settings or RouterSettings(default=heads[0]),
        files=[File(path="model.onnx", size=0, sha256="0" * 64)],
    )
