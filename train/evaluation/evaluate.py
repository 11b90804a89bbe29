"""Evaluation: what the answers to clean pictures and to 15 corruptions x 5 severities are worth."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trivium.runtime.bundle import Manifest
from trivium.runtime.errors import ConfigError
from trivium.runtime.router import routers

from ..data.pictures import Pictures
from ..data.shift_sets import ShiftSet
from ..models.mc import ORIGINAL
from ..shifts.corruptions import SEVERITIES, TEST_CORRUPTIONS
from ..shifts.styles import STYLES
from . import metrics
from .record import costs, package_versions, trained_on, training_seed
from .results import (
    Answerer,
    Bounds,
    Corrupted,
    Data,
    Detection,
    Diagram,
    Diagrams,
    Histogram,
    Model,
    Results,
    Two,
    TwoDifferences,
    short,
)
from .shifted import COVERAGE, difference, mean_corruption_error, measure_outside, measure_set, measure_styles
from .subject import Subject
from .tally import CLEAN, Tally, ask, choose_pictures, variants

ENTROPY_BINS = 30
LEAST_GAP = 5e-4
"""Of accuracy; no share of a smaller gap is worth naming."""


def evaluate(
    subject: Subject,
    pictures: Pictures,
    *,
    original: Subject | None = None,
    count: int | None = None,
    seed: int = 0,
    left_out: Sequence[str] = (),
    sets: Sequence[ShiftSet] = (),
    styles: bool = False,
    outside: Mapping[str, Pictures] | None = None,
    command: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Results, Tally]:
    """Ask and sum up.

    Args:
        original: see `ask`.
        count: pictures to corrupt at most, drawn by seed; None corrupts all. Clean figures are of all pictures.
        left_out: corruptions that do not count, besides those that calibration saw.
        sets: shift sets to ask about too.
        styles: ask about the same pictures in every style too.
        outside: data sets of other things, by name.
        command: as the user gave it, for the record.

    Raises: ConfigError where data and model do not fit.
    """
    if unknown := set(left_out) - set(TEST_CORRUPTIONS):
        raise ConfigError(f"no corruption {min(unknown)!r}; there are: {', '.join(TEST_CORRUPTIONS)}")
    began, cpu = time.perf_counter(), time.process_time()
    chosen = choose_pictures(pictures, count, seed)
    if len(chosen) == 0:
        raise ConfigError("there are no test pictures")
    seen = subject.manifest.calibration.mixture if subject.manifest.calibration else {}
    excluded = [name for name in TEST_CORRUPTIONS if name in seen or name in left_out]
    if len(excluded) == len(TEST_CORRUPTIONS):
        raise ConfigError("every corruption is left out, so nothing counts")
    if original is not None and list(original.manifest.classes) != list(subject.manifest.classes):
        raise ConfigError(f"--original {original.path}: its classes, or their order, are not those of {subject.path}")
    for name, other in (outside or {}).items():
        if other.describe()["digest"] == pictures.describe()["digest"]:
            raise ConfigError(f"--ood {name}: that is the data under test itself")
    if taken := [each.name for each in sets if styles and each.name in STYLES]:
        raise ConfigError(f"--shift {taken[0]}: the name of a style; give the set another")
    tally = ask(subject, pictures, chosen, variants(), original=original, seed=seed, progress=progress)
    if len(chosen) < len(pictures):
        tally.whole = ask(subject, pictures, np.arange(len(pictures)), [CLEAN], original=original, seed=seed)
    manifest = subject.manifest
    document = pictures.describe()
    names = [name for name in tally.class_id if name != ORIGINAL or ORIGINAL in manifest.heads]
    best = best_head(tally, manifest.heads, excluded)
    shifts = {
        each.name: measure_set(subject, each, original=original, excluded=excluded, progress=progress) for each in sets
    }
    if styles:
        shifts |= measure_styles(subject, pictures, chosen, original=original, seed=seed, progress=progress)
    ood = {
        name: measure_outside(subject, tally.clean, other, original=original, progress=progress)
        for name, other in (outside or {}).items()
    }
    corruptions = {
        kind: Corrupted(
            counted=kind not in excluded,
            accuracy={name: by_severity(tally, tally.right(name), kind) for name in tally.class_id},
            oracle=by_severity(tally, any_right(tally, manifest.heads), kind),
        )
        for kind in TEST_CORRUPTIONS
    }
    if ORIGINAL in manifest.heads:
        source = "the model's own head"
    elif original is not None:
        source = f"{original.path} ({original.original_is or 'its default router'})"
    elif subject.original_is is not None:
        source = subject.original_is
    else:
        source = "absent: a bundle holds no original classifier; name one with --original"
    results = Results(
        command=shlex.join(command),
        seed=seed,
        versions=package_versions(),
        cpu_seconds=round(time.process_time() - cpu, 1),
        wall_seconds=round(time.perf_counter() - began, 1),
        model=Model(
            kind=subject.kind,
            path=subject.path,
            name=manifest.name,
            heads=list(manifest.heads),
            classes=list(manifest.classes),
            routers=routers(manifest),
            default_router=manifest.router.default,
            original=source,
            training_seed=training_seed(manifest),
        ),
        data=Data(
            source=document["source"],
            split=pictures.split,
            pictures=len(pictures),
            corrupted=len(chosen),
            digest=document["digest"],
        ),
        severities=list(SEVERITIES),
        left_out=excluded,
        trained_on=trained_on(manifest),
        answerers=[answerer(tally, manifest, name, best, excluded) for name in tally.class_id],
        corruptions=corruptions,
        bounds=bounds(tally, manifest.heads, [n for n in names if n not in manifest.heads], best, excluded),
        detection=detection(tally, manifest.router.default, excluded),
        head_share=head_share(tally, excluded),
        reliability={name: diagrams(tally, name, excluded) for name in tally.class_id},
        entropy={head: histogram(tally, head, len(manifest.classes), excluded) for head in manifest.heads},
        calibration=manifest.calibration,
        costs=costs(manifest),
        mce=mean_corruption_error(corruptions, "original"),
        shifts=shifts,
        ood=ood,
    )
    return results, tally


def counted(tally: Tally, excluded: Sequence[str]) -> NDArray[np.intp]:
    """Numbers of the corrupted variants that enter headline figures."""
    return np.array([v for v, (name, severity) in enumerate(tally.variants) if severity and name not in excluded])


def two(tally: Tally, measure: Callable[[Tally], NDArray[Any]], excluded: Sequence[str]) -> Two:
    """Means of a measure, [V, N] of each tally, over clean and over counted corrupted views."""
    corrupted = measure(tally)[counted(tally, excluded)]
    return Two(clean=short(measure(tally.clean)[0].mean()), corrupted=short(corrupted.mean()))


def best_head(tally: Tally, heads: Sequence[str], excluded: Sequence[str]) -> str:
    """The head most accurate on the mix of half clean, half corrupted."""
    return max(heads, key=lambda head: _mix(two(tally, right_of(head), excluded)))


def right_of(name: str) -> Callable[[Tally], NDArray[np.bool_]]:
    """The measure "this answerer is right", for two()."""
    return lambda tally: tally.right(name)


def any_right(tally: Tally, heads: Sequence[str]) -> NDArray[np.bool_]:
    """[V, N]: whether any head is right."""
    return np.asarray(np.any([tally.right(head) for head in heads], axis=0))


def answerer(tally: Tally, manifest: Manifest, name: str, best: str, excluded: Sequence[str]) -> Answerer:
    """One answerer's measures."""
    shifted, clean = counted(tally, excluded), tally.clean
    right, confidence = tally.right(name), tally.confidence[name]
    clean_right, clean_confidence = clean.right(name)[0], clean.confidence[name][0]
    if name == ORIGINAL:
        role = "original"
    else:
        role = "head" if name in manifest.heads else "rule"
    negative = positive = over_original = None
    if ORIGINAL in tally.class_id:
        negative = two(tally, lambda t: t.right(ORIGINAL) & ~t.right(name), excluded)
        positive = two(tally, lambda t: ~t.right(ORIGINAL) & t.right(name), excluded)
        over_original = differences(tally, name, ORIGINAL, shifted)
    return Answerer.model_validate(
        {
            "name": name,
            "role": role,
            "default": name == manifest.router.default,
            "accuracy": two(tally, right_of(name), excluded),
            "negative_flips": negative,
            "positive_flips": positive,
            "ece": {
                "clean": short(metrics.calibration_error(metrics.reliability(clean_confidence, clean_right))),
                "corrupted": short(
                    metrics.calibration_error(metrics.reliability(confidence[shifted].ravel(), right[shifted].ravel()))
                ),
            },
            "brier": two(tally, lambda t: t.squared_error[name], excluded),
            "nll": two(tally, lambda t: t.log_loss[name], excluded),
            "accuracy_at_80": {
                "clean": short(metrics.accuracy_at_coverage(clean_confidence, clean_right, COVERAGE)),
                "corrupted": short(
                    metrics.accuracy_at_coverage(confidence[shifted].ravel(), right[shifted].ravel(), COVERAGE)
                ),
            },
            "over_original": over_original,
            "over_best_head": differences(tally, name, best, shifted),
        }
    )


def differences(tally: Tally, name: str, other: str, shifted: NDArray[np.intp]) -> TwoDifferences:
    """Accuracy of one answerer less another's; a picture's corrupted views are resampled together."""
    clean = tally.clean.right(name)[0].astype(np.float64) - tally.clean.right(other)[0]
    corrupted = tally.right(name)[shifted].astype(np.float64) - tally.right(other)[shifted]
    return TwoDifferences(clean=difference(clean), corrupted=difference(corrupted.mean(0)))


def by_severity(tally: Tally, values: NDArray[Any], kind: str) -> list[float]:
    """Means of values [V, N] at each severity of a corruption."""
    return [short(values[tally.variants.index((kind, severity))].mean()) for severity in SEVERITIES]


def bounds(tally: Tally, heads: Sequence[str], rules: Sequence[str], best: str, excluded: Sequence[str]) -> Bounds:
    """The oracles, and how much of the way to them each rule goes."""
    alone = two(tally, right_of(best), excluded)
    oracle = two(tally, lambda t: any_right(t, heads), excluded)
    kinds = [kind for kind in TEST_CORRUPTIONS if kind not in excluded]
    means = {kind: [np.mean(by_severity(tally, tally.right(head), kind)) for head in heads] for kind in kinds}
    domain = Two(
        clean=short(max(tally.clean.right(head)[0].mean() for head in heads)),
        corrupted=short(np.mean([max(each) for each in means.values()])),
    )

    def captured(limit: Two) -> dict[str, float | None]:
        gap = _mix(limit) - _mix(alone)
        gains = {rule: _mix(two(tally, right_of(rule), excluded)) - _mix(alone) for rule in rules}
        return {rule: short(gain / gap) if gap >= LEAST_GAP else None for rule, gain in gains.items()}

    return Bounds(
        best_head=best,
        best_head_accuracy=alone,
        oracle=oracle,
        domain_oracle=domain,
        captured=captured(oracle),
        captured_domain=captured(domain),
    )


def detection(tally: Tally, default: str, excluded: Sequence[str]) -> list[Detection]:
    """How well each score finds corrupted pictures, and the default router's errors."""
    shifted = counted(tally, excluded)
    wrong = ~tally.right(default)
    is_shifted = np.concatenate([np.zeros(len(tally.labels), bool), np.ones(len(shifted) * len(tally.labels), bool)])
    return [
        Detection(
            score=score,
            shift=_maybe(metrics.auroc(np.concatenate([values[0], values[shifted].ravel()]), is_shifted)),
            errors_clean=_maybe(metrics.auroc(values[0], wrong[0])),
            errors_corrupted=_maybe(metrics.auroc(values[shifted].ravel(), wrong[shifted].ravel())),
        )
        for score, values in tally.scores.items()
    ]


def head_share(tally: Tally, excluded: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Rule -> severity (0: clean) -> label -> share of the counted views that it answered; rules that always answer
    the same way are left out."""
    shares: dict[str, dict[str, dict[str, float]]] = {}
    for rule, places in tally.answered_by.items():
        used = [tally.voices[i] for i in np.unique(places)]
        if len(used) == 1:
            continue
        shares[rule] = {}
        for severity in (0, *SEVERITIES):
            rows = [v for v, (name, s) in enumerate(tally.variants) if s == severity and name not in excluded]
            part = places[rows]
            shares[rule][str(severity)] = {
                label: short((part == tally.voices.index(label)).mean()) for label in sorted(used)
            }
    return shares


def diagrams(tally: Tally, name: str, excluded: Sequence[str]) -> Diagrams:
    """Reliability of one answerer on clean and on counted corrupted views."""
    right, confidence, shifted = tally.right(name), tally.confidence[name], counted(tally, excluded)
    clean = tally.clean
    return Diagrams(
        clean=_diagram(metrics.reliability(clean.confidence[name][0], clean.right(name)[0])),
        corrupted=_diagram(metrics.reliability(confidence[shifted].ravel(), right[shifted].ravel())),
    )


def histogram(tally: Tally, head: str, classes: int, excluded: Sequence[str]) -> Histogram:
    """Predictive entropy of one head, from 0 to log C."""
    score = f"predictive entropy, {head}"
    edges = np.linspace(0, np.log(max(classes, 2)), ENTROPY_BINS + 1)

    def shares(part: NDArray[Any]) -> list[float]:
        # rounding may put a uniform answer a hair above log C
        numbers = np.histogram(np.clip(part, 0, edges[-1]), edges)[0]
        return [short(number / part.size) for number in numbers]

    return Histogram(
        edges=[short(edge) for edge in edges],
        clean=shares(tally.clean.scores[score][0]),
        corrupted=shares(tally.scores[score][counted(tally, excluded)]),
    )


def _mix(values: Two) -> float:
    return 0.5 * (values.clean + values.corrupted)


def _maybe(value: float | None) -> float | None:
    return None if value is None else short(value)


def _diagram(found: metrics.Reliability) -> Diagram:
    def plain(values: NDArray[np.float64]) -> list[float | None]:
        return [None if np.isnan(value) else short(value) for value in values]

    return Diagram(
        edges=[short(edge) for edge in found.edges],
        counts=found.counts.tolist(),
        confidence=plain(found.confidence),
        accuracy=plain(found.accuracy),
    )
