"""The answers of an evaluation: every picture, clean and corrupted, asked of heads, rules and the original."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trivium.kernels import HeadStatistics
from trivium.runtime.bundle import Manifest
from trivium.runtime.errors import ConfigError
from trivium.runtime.router import route, routers, symmetric_divergence

from ..data.pictures import Pictures
from ..shifts.corruptions import SEVERITIES, TEST_CORRUPTIONS, corrupt
from . import metrics
from .subject import Probabilities, Subject

ORIGINAL = "original"
CHUNK_BYTES = 64 << 20
"""Of pictures, held at once."""

Variant = tuple[str, int]
CLEAN: Variant = ("clean", 0)


@dataclass
class Tally:
    """Everything kept of the answers: V variants x N pictures, for each answerer and each head."""

    variants: list[Variant]
    labels: NDArray[np.int64]
    class_id: dict[str, NDArray[np.int32]] = field(default_factory=dict)
    """Answerer -> [V, N], as all by-answerer arrays."""
    confidence: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    squared_error: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    log_loss: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    scores: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """Score -> [V, N]; higher means less familiar."""
    answered_by: dict[str, NDArray[np.int32]] = field(default_factory=dict)
    """Rule -> [V, N]: place in `voices` of who answered under this rule."""
    voices: list[str] = field(default_factory=list)
    """Labels of who answered: heads, or a blend of some."""
    whole: Tally | None = None
    """The clean views of all test pictures, where the corrupted ones are of some only."""

    @property
    def clean(self) -> Tally:
        """Where the clean figures come from: variant 0 of all test pictures."""
        return self.whole or self

    def right(self, answerer: str) -> NDArray[np.bool_]:
        """[V, N]."""
        return np.asarray(self.class_id[answerer] == self.labels)

    def put(self, group: dict[str, Any], name: str, v: int, rows: slice, values: NDArray[Any]) -> None:
        if name not in group:
            integer = np.issubdtype(values.dtype, np.integer)
            group[name] = np.zeros((len(self.variants), len(self.labels)), np.int32 if integer else np.float32)
        group[name][v, rows] = values


def variants() -> list[Variant]:
    """(corruption, severity) of every view, ("clean", 0) first."""
    return [CLEAN, *((name, severity) for name in TEST_CORRUPTIONS for severity in SEVERITIES)]


def choose_pictures(pictures: Pictures, count: int | None, seed: int) -> NDArray[np.intp]:
    """Indices of the pictures to ask about, in ascending order: all, or `count` drawn by seed."""
    if count is None or count >= len(pictures):
        return np.arange(len(pictures))
    return np.sort(np.random.Generator(np.random.Philox(seed)).permutation(len(pictures))[:count])


def labels_for(pictures: Pictures, classes: Sequence[str]) -> NDArray[np.int64]:
    """The pictures' labels as the model counts its classes.

    Raises: ConfigError where the data has a class that the model does not know.
    """
    if list(pictures.classes) == list(classes):
        return pictures.labels
    place = {name: i for i, name in enumerate(classes)}
    if unknown := [name for name in pictures.classes if name not in place]:
        raise ConfigError(f"the data has {len(unknown)} classes that the model does not know, say {unknown[0]!r}")
    return np.array([place[name] for name in pictures.classes])[pictures.labels]


def ask(
    subject: Subject,
    pictures: Pictures,
    chosen: NDArray[np.intp],
    views: Sequence[Variant],
    *,
    original: Subject | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Tally:
    """Every chosen picture in every view, asked of the model and of the original.

    Args:
        original: another model that stands for the original classifier; None takes the subject's own, where it has one.
        progress: told (views done, views in all).
    """
    manifest = subject.manifest
    tally = Tally(list(views), labels_for(pictures, manifest.classes)[chosen])
    size = pictures.preprocessing
    chunk = max(16, CHUNK_BYTES // (size.height * size.width * 3))
    done = 0
    for start in range(0, len(chosen), chunk):
        rows = slice(start, min(start + chunk, len(chosen)))
        images = pictures.batch(chosen[rows]).permute(0, 2, 3, 1).contiguous().numpy()
        for v, (name, severity) in enumerate(tally.variants):
            view = images if severity == 0 else corrupt(images, name, severity, seed, start)
            statistics, own = subject.answer(view)
            answer = own if original is None else original.original(view)
            count(tally, manifest, v, rows, statistics, answer)
            done += len(view)
            if progress is not None:
                progress(done, len(tally.variants) * len(chosen))
    return tally


def count(
    tally: Tally, manifest: Manifest, v: int, rows: slice, statistics: HeadStatistics, original: Probabilities | None
) -> None:
    """Enter the answers to pictures `rows` under variant number v."""
    labels = tally.labels[rows]
    for name, probabilities, answered_by in answers(statistics, manifest, original):
        if name not in manifest.heads and answered_by:
            tally.voices += sorted(set(answered_by) - set(tally.voices))
            places = np.array([tally.voices.index(label) for label in answered_by])
            tally.put(tally.answered_by, name, v, rows, places)
        tally.put(tally.class_id, name, v, rows, probabilities.argmax(1))
        tally.put(tally.confidence, name, v, rows, probabilities.max(1))
        tally.put(tally.squared_error, name, v, rows, metrics.squared_error(probabilities, labels))
        tally.put(tally.log_loss, name, v, rows, metrics.log_loss(probabilities, labels))
    default = tally.confidence[manifest.router.default][v, rows]
    tally.put(tally.scores, "1 - max probability", v, rows, 1 - default)
    for k, head in enumerate(manifest.heads):
        tally.put(tally.scores, f"predictive entropy, {head}", v, rows, statistics.predictive_entropy[:, k])
        tally.put(tally.scores, f"mutual information, {head}", v, rows, statistics.mutual_information[:, k])
        tally.put(tally.scores, f"energy, {head}", v, rows, statistics.energy[:, k])
    if {"clean", "robust"} <= set(manifest.heads):
        divergence = symmetric_divergence(statistics, manifest.heads.index("clean"), manifest.heads.index("robust"))
        tally.put(tally.scores, "divergence, clean and robust", v, rows, divergence)


def answers(
    statistics: HeadStatistics, manifest: Manifest, original: Probabilities | None
) -> Iterator[tuple[str, Probabilities, list[str]]]:
    """(answerer, probabilities [N, C], who answered each picture) of the original, then of every router."""
    if original is not None and ORIGINAL not in manifest.heads:
        yield ORIGINAL, original, []
    for name in routers(manifest):
        routed = route(statistics, manifest, name)
        yield name, routed.probabilities, routed.head
