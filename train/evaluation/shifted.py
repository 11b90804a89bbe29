"""Measures on shift sets, on the test pictures in other styles, and on pictures of other things."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trivium.runtime.errors import ConfigError

from ..data.pictures import Pictures
from ..data.shift_sets import ShiftSet
from ..models.mc import ORIGINAL
from ..shifts.corruptions import CALIBRATION_CORRUPTIONS
from ..shifts.styles import STYLES, seen_styles
from . import metrics
from .results import Corrupted, Difference, MeanCorruptionError, OnShift, Outside, Shift, short
from .subject import Subject
from .tally import CLEAN, Tally, ask

COVERAGE = 0.8
IMAGENET = 1000
"""Classes of ImageNet-1k."""
Progress = Callable[[int, int], None]


def measure_set(
    subject: Subject,
    found: ShiftSet,
    *,
    original: Subject | None = None,
    excluded: Sequence[str] = (),
    progress: Progress | None = None,
) -> Shift:
    """Ask about a shift set, every picture once.

    Args:
        excluded: corruptions that do not count, besides the benchmark's four for validation, of ImageNet-C.
    """
    chosen = np.arange(len(found.pictures))
    tally = ask(subject, found.pictures, chosen, [CLEAN], original=original, progress=progress, read=found.read)
    rows, units = chosen, None
    corruptions: dict[str, Corrupted] = {}
    mce = None
    if found.cells is not None:
        uncounted = {*CALIBRATION_CORRUPTIONS, *excluded}
        corruptions = by_corruption(tally, found.cells, found.corruptions, uncounted, subject.manifest.heads)
        counted = [i for i, name in enumerate(found.corruptions) if name not in uncounted]
        if not counted:
            raise ConfigError(f"{found.source}: calibration saw every corruption in it, or it is left out")
        rows = np.flatnonzero(np.isin(found.cells[:, 0], counted))
        units = found.cells[rows, 2]
        size = subject.manifest.preprocessing
        alexnet = (size.height, size.width) == (224, 224) and len(found.answers) == IMAGENET
        mce = mean_corruption_error(corruptions, "alexnet" if alexnet else "original")
    return Shift(
        reader=found.reader,
        source=found.source,
        pictures=len(found.pictures),
        classes=found.classes,
        counted=True,
        note=found.note,
        digest=found.digest,
        answerers={name: on_view(tally, name, rows=rows, units=units) for name in tally.class_id},
        severities=[] if found.cells is None else np.unique(found.cells[:, 1]).tolist(),
        corruptions=corruptions,
        mce=mce,
    )


def measure_styles(
    subject: Subject,
    pictures: Pictures,
    chosen: NDArray[np.intp],
    *,
    original: Subject | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Shift]:
    """Ask about the chosen test pictures in every style; those that the recipe's training saw do not count."""
    views = [(name, 0) for name in STYLES]
    tally = ask(subject, pictures, chosen, views, original=original, seed=seed, progress=progress)
    seen = seen_styles(subject.manifest.provenance.get("recipe"))
    document = pictures.describe()
    return {
        name: Shift(
            reader="style",
            source=document["source"],
            pictures=len(chosen),
            classes=len(np.unique(tally.labels)),
            counted=name not in seen,
            note="training saw structural views of this kind" if name in seen else "",
            digest=document["digest"],
            answerers={each: on_view(tally, each, v) for each in tally.class_id},
        )
        for v, (name, _) in enumerate(views)
    }


def measure_outside(
    subject: Subject,
    clean: Tally,
    outside: Pictures,
    *,
    original: Subject | None = None,
    progress: Progress | None = None,
) -> Outside:
    """How well each score tells pictures of other things from the clean test pictures, which `clean` holds.

    Their own labels play no part.
    """

    def unlabelled(probabilities: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        return np.zeros(len(probabilities), np.int64), np.ones((len(probabilities), int(outside.labels.max()) + 1))

    chosen = np.arange(len(outside))
    tally = ask(subject, outside, chosen, [CLEAN], original=original, progress=progress, read=unlabelled)
    is_outside = np.arange(len(clean.labels) + len(outside)) >= len(clean.labels)
    auroc = {
        score: metrics.auroc(np.concatenate([clean.scores[score][0], values[0]]), is_outside)
        for score, values in tally.scores.items()
    }
    document = outside.describe()
    return Outside(
        source=document["source"],
        pictures=len(outside),
        digest=document["digest"],
        auroc={score: None if value is None else short(value) for score, value in auroc.items()},
    )


def on_view(
    tally: Tally, name: str, v: int = 0, *, rows: NDArray[np.intp] | None = None, units: NDArray[np.int64] | None = None
) -> OnShift:
    """One answerer's measures on variant v; rows: the pictures that count; units: of what each of these is a version
    (None: of itself)."""
    rows = np.arange(len(tally.labels)) if rows is None else rows
    right, confidence = tally.right(name)[v, rows], tally.confidence[name][v, rows]
    negative = positive = gain = None
    if ORIGINAL in tally.class_id and name != ORIGINAL:
        was = tally.right(ORIGINAL)[v, rows]
        negative, positive = short((was & ~right).mean()), short((~was & right).mean())
        gain = difference(by_unit(right.astype(np.float64) - was, units))
    return OnShift(
        accuracy=short(right.mean()),
        negative_flips=negative,
        positive_flips=positive,
        ece=short(metrics.calibration_error(metrics.reliability(confidence, right))),
        brier=short(tally.squared_error[name][v, rows].mean()),
        nll=short(tally.log_loss[name][v, rows].mean()),
        accuracy_at_80=short(metrics.accuracy_at_coverage(confidence, right, COVERAGE)),
        over_original=gain,
    )


def by_unit(values: NDArray[np.float64], units: NDArray[np.int64] | None) -> NDArray[np.float64]:
    """Sums of values [N] over the versions of each unit, scaled so that their plain mean is the mean of the values."""
    if units is None:
        return values
    _, unit = np.unique(units, return_inverse=True)
    return np.asarray(np.bincount(unit, values) * ((unit.max() + 1) / len(values)))


def difference(values: NDArray[np.float64]) -> Difference:
    """The mean of independent paired differences with its interval."""
    interval = metrics.paired_bootstrap(values)
    return Difference(mean=short(interval.mean), low=short(interval.low), high=short(interval.high))


def by_corruption(
    tally: Tally, cells: NDArray[np.int64], names: Sequence[str], uncounted: set[str], heads: Sequence[str]
) -> dict[str, Corrupted]:
    """Accuracies of ImageNet-C's pictures, cells [N, 3] as in ShiftSet."""
    severities = np.unique(cells[:, 1])
    oracle = np.any([tally.right(head)[0] for head in heads], axis=0)

    def by_severity(right: NDArray[np.bool_], i: int) -> list[float]:
        return [short(right[(cells[:, 0] == i) & (cells[:, 1] == severity)].mean()) for severity in severities]

    return {
        name: Corrupted(
            counted=name not in uncounted,
            accuracy={each: by_severity(tally.right(each)[0], i) for each in tally.class_id},
            oracle=by_severity(oracle, i),
        )
        for i, name in enumerate(names)
    }


def mean_corruption_error(
    corruptions: Mapping[str, Corrupted], yardstick: Literal["alexnet", "original"]
) -> MeanCorruptionError | None:
    """mCE of every answerer over the counted corruptions; None without an original to compare with.

    AlexNet is the yardstick only where the counted corruptions are the benchmark's fifteen in five severities.
    """
    counted = {name: found for name, found in corruptions.items() if found.counted}
    errors = {
        answerer: {name: 1 - float(np.mean(found.accuracy[answerer])) for name, found in counted.items()}
        for answerer in next(iter(counted.values())).accuracy
    }
    whole = set(counted) == set(metrics.ALEXNET) and all(len(found.oracle) == 5 for found in counted.values())
    if yardstick == "alexnet" and whole:
        reference: Mapping[str, float] = metrics.ALEXNET
    elif ORIGINAL in errors:
        yardstick, reference = "original", errors[ORIGINAL]
    else:
        return None
    values = {answerer: metrics.mean_corruption_error(own, reference) for answerer, own in errors.items()}
    known = {answerer: short(value) for answerer, value in values.items() if value is not None}
    return MeanCorruptionError(yardstick=yardstick, values=known) if known else None
