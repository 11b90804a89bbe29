"""The measures by which evaluations are compared, as columns of tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np

from ..models.mc import ORIGINAL
from .results import Answerer, OnShift, Results

Unit = Literal["share", "points", "number", "seconds", "area"]
"""share: in [0, 1], shown in percent; points: a difference of shares; area: under a curve, or another plain number."""
Of = Callable[[Results, Answerer], float | None]
DROPOUT_SCORES = ("energy", "mutual information", "divergence")


@dataclass(frozen=True)
class Column:
    """A measure of an answerer. better: 1 where more is better, -1 where less is, 0 where neither."""

    name: str
    of: Of
    unit: Unit = "share"
    better: int = 0


ACCURACY = (
    Column("clean accuracy", lambda r, a: a.accuracy.clean, better=1),
    Column("corrupted accuracy", lambda r, a: a.accuracy.corrupted, better=1),
    Column("mCE", lambda r, a: r.mce.values.get(a.name) if r.mce else None, "number", -1),
    Column("clean over original", lambda r, a: _gain(a, "clean"), "points", 1),
    Column("corrupted over original", lambda r, a: _gain(a, "corrupted"), "points", 1),
    Column("negative flips, clean", lambda r, a: _flips(a, "clean"), better=-1),
    Column("negative flips, corrupted", lambda r, a: _flips(a, "corrupted"), better=-1),
    Column("training, CPU-s", lambda r, a: cost(r, a, "cpu_seconds"), "seconds"),
    Column("training, GPU-s", lambda r, a: cost(r, a, "gpu_seconds"), "seconds"),
)
CONFIDENCE = (
    Column("ECE, clean", lambda r, a: a.ece.clean, better=-1),
    Column("ECE, corrupted", lambda r, a: a.ece.corrupted, better=-1),
    Column("Brier, clean", lambda r, a: a.brier.clean, "area", -1),
    Column("Brier, corrupted", lambda r, a: a.brier.corrupted, "area", -1),
    Column("accuracy at 80 %, clean", lambda r, a: a.accuracy_at_80.clean, better=1),
    Column("accuracy at 80 %, corrupted", lambda r, a: a.accuracy_at_80.corrupted, better=1),
)
MEAN = "mean of those that count"


def shift_columns(runs: Sequence[Results], measure: Callable[[OnShift], float | None], better: int) -> list[Column]:
    """A column a shift, and the mean over those that count."""

    def on(name: str) -> Of:
        return lambda r, a: measure(r.shifts[name].answerers[a.name]) if name in r.shifts else None

    def mean(r: Results, a: Answerer) -> float | None:
        return _mean([measure(shift.answerers[a.name]) for shift in r.shifts.values() if shift.counted])

    names = dict.fromkeys(name for run in runs for name in run.shifts)
    if not names:
        return []
    seen = {name for run in runs for name, shift in run.shifts.items() if not shift.counted}
    columns = [Column(f"{name} (seen by some)" if name in seen else name, on(name), better=better) for name in names]
    # a mean over other sets would be no comparison
    alike = len({tuple(name for name, shift in run.shifts.items() if shift.counted) for run in runs}) == 1
    return [*columns, *([Column(MEAN, mean, better=better)] if alike and len(names) > 1 else [])]


def attack_columns(runs: Sequence[Results]) -> list[Column]:
    """A column for every attack at the radius that was asked for, and one for the least that any of them leaves."""
    found = {(r.attacks.norm, r.attacks.eps, row.attack) for r in runs if r.attacks for row in r.attacks.rows}
    columns = []
    for norm, eps in sorted({(norm, eps) for norm, eps, _ in found}):
        names = sorted(attack for each, at, attack in found if (each, at) == (norm, eps))
        columns += [Column(f"{name}, {radius(norm, eps)}", robust(norm, eps, name), better=1) for name in names]
        if len(names) > 1:
            columns.append(Column(f"least, {radius(norm, eps)}", robust(norm, eps), better=1))
    return columns


def robust(norm: str, eps: float, attack: str | None = None) -> Of:
    """Accuracy under an attack, None: under that which leaves least; eps 0: on the same pictures, not attacked."""

    def of(r: Results, a: Answerer) -> float | None:
        if r.attacks is None or r.attacks.norm != norm:
            return None
        if eps == 0:
            return r.attacks.clean.get(a.name)
        rows = [row for row in r.attacks.rows if row.answerer == a.name and row.eps == eps]
        return min((row.accuracy for row in rows if attack in (None, row.attack)), default=None)

    return of


def radius(norm: str, eps: float) -> str:
    """Linf 8/255, L2 0.5."""
    level = Fraction(round(eps * 255), 255)
    whole = norm == "linf" and abs(float(level) - eps) < 1e-5
    return f"{'Linf' if norm == 'linf' else 'L2'} {f'{round(eps * 255)}/255' if whole else f'{eps:g}'}"


def outside_columns(runs: Sequence[Results]) -> list[Column]:
    """Columns for each other data set: the routed answer's probability and entropy, and the answering system's energy,
    mutual information and divergence, each the mean over its heads or pairs of heads."""

    def of(data: str, score: str) -> Of:
        def found(r: Results, a: Answerer) -> float | None:
            if data not in r.ood:
                return None
            auroc = r.ood[data].auroc
            if a.role == "original":
                values = [auroc.get(f"{score}, {ORIGINAL}")]
            elif score in DROPOUT_SCORES:
                values = [value for name, value in auroc.items() if name.startswith(f"{score}, ")]
            else:
                values = [auroc.get(score, auroc.get(f"{score}, {r.model.default_router}"))]
            return _mean(values)

        return found

    names = dict.fromkeys(name for run in runs for name in run.ood)
    several = len(names) > 1
    return [
        Column(f"{name}: {score}" if several else score, of(name, score), "area", 1)
        for name in names
        for score in ("1 - max probability", "predictive entropy", *DROPOUT_SCORES)
    ]


def cost(r: Results, a: Answerer, key: str) -> float | None:
    """Seconds of all training stages after the original classifier; none of these for the original itself."""
    if not r.costs:
        return None
    total = sum(float(stage.get(key) or 0) for name, stage in r.costs.items() if name != ORIGINAL)
    if a.role == "original":
        total = 0.0
    elif total == 0:
        return None
    return total if key == "cpu_seconds" or any(stage.get(key) for stage in r.costs.values()) else None


def _gain(a: Answerer, part: str) -> float | None:
    # the original's gain over itself says nothing
    return None if a.over_original is None or a.role == "original" else getattr(a.over_original, part).mean


def _flips(a: Answerer, part: str) -> float | None:
    return None if a.negative_flips is None or a.role == "original" else getattr(a.negative_flips, part)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None
