"""The answers of an evaluation: every picture, clean and corrupted, asked of heads, rules and the original."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trivium.kernels import HeadStatistics
from trivium.runtime.bundle import Manifest
from trivium.runtime.router import route, routers, symmetric_divergence

from ..data.pictures import Pictures
from ..data.shift_sets import match
from ..models.mc import ORIGINAL
from ..shifts.corruptions import SEVERITIES, TEST_CORRUPTIONS, corrupt
from ..shifts.styles import STYLES, restyle
from . import metrics
from .subject import Probabilities, Subject

CHUNK_BYTES = 64 << 20
"""Of pictures, held at once."""

Variant = tuple[str, int]
"""A corruption or style and its severity; styles have severity 0."""
CLEAN: Variant = ("clean", 0)
Read = Callable[[Probabilities], tuple[NDArray[np.int64], NDArray[np.float64]]]
"""Probabilities of the model's classes [N, C] -> the answer given [N], and the probability of each answer [N, A]."""


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


def view(images: NDArray[np.uint8], name: str, severity: int, seed: int, first: int = 0) -> NDArray[np.uint8]:
    """Pictures uint8 [B, H, W, 3] as one variant shows them; `first`: see `corrupt`."""
    if name in STYLES:
        return restyle(images, name, seed, first)
    return corrupt(images, name, severity, seed, first) if severity else images


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
    # not by index: other data of as many classes would pass for this one
    return match(pictures.classes, classes, "the data", by_index=False)[pictures.labels]


def ask(
    subject: Subject,
    pictures: Pictures,
    chosen: NDArray[np.intp],
    views: Sequence[Variant],
    *,
    original: Subject | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    read: Read | None = None,
) -> Tally:
    """Every chosen picture in every view, asked of the model and of the original.

    Args:
        original: another model that stands for the original classifier; None takes the subject's own, where it has one.
        progress: told (views done, views in all).
        read: how answers are read where the pictures' labels do not number the model's classes.
    """
    manifest = subject.manifest
    labels = labels_for(pictures, manifest.classes) if read is None else pictures.labels
    tally = Tally(list(views), labels[chosen])
    size = pictures.preprocessing
    chunk = max(16, CHUNK_BYTES // (size.height * size.width * 3))
    done = 0
    for start in range(0, len(chosen), chunk):
        rows = slice(start, min(start + chunk, len(chosen)))
        images = pictures.batch(chosen[rows]).permute(0, 2, 3, 1).contiguous().numpy()
        for v, (name, severity) in enumerate(tally.variants):
            seen = view(images, name, severity, seed, start)
            statistics, own = subject.answer(seen)
            answer = own if original is None else original.original(seen)
            count(tally, manifest, v, rows, statistics, answer, read)
            done += len(seen)
            if progress is not None:
                progress(done, len(tally.variants) * len(chosen))
    return tally


def count(
    tally: Tally, manifest: Manifest, v: int, rows: slice, statistics: HeadStatistics, original: Probabilities | None,
    read: Read | None = None,
) -> None:  # fmt: skip
    """Enter the answers to pictures `rows` under variant number v."""
    labels = tally.labels[rows]
    for name, probabilities, answered_by in answers(statistics, manifest, original):
        if name not in manifest.heads and answered_by:
            tally.voices += sorted(set(answered_by) - set(tally.voices))
            places = np.array([tally.voices.index(label) for label in answered_by])
            tally.put(tally.answered_by, name, v, rows, places)
        # the default's, and again by name those of heads; the only head of a model needs no mention twice
        named = [f", {name}"] if name in manifest.heads or name == ORIGINAL else []
        routed = [""] if name == manifest.router.default and len(manifest.heads) > 1 else []
        for whose in routed + named:
            tally.put(tally.scores, f"1 - max probability{whose}", v, rows, 1 - probabilities.max(1))
            tally.put(tally.scores, f"predictive entropy{whose}", v, rows, entropy(probabilities))
        given, shares = (probabilities.argmax(1), probabilities) if read is None else read(probabilities)
        tally.put(tally.class_id, name, v, rows, given)
        tally.put(tally.confidence, name, v, rows, shares[np.arange(len(given)), given])
        tally.put(tally.squared_error, name, v, rows, metrics.squared_error(shares, labels))
        tally.put(tally.log_loss, name, v, rows, metrics.log_loss(shares, labels))
    for k, head in enumerate(manifest.heads):
        tally.put(tally.scores, f"mutual information, {head}", v, rows, statistics.mutual_information[:, k])
        tally.put(tally.scores, f"energy, {head}", v, rows, statistics.energy[:, k])
    for i, j in combinations(range(len(manifest.heads)), 2):
        name = f"divergence, {manifest.heads[i]} and {manifest.heads[j]}"
        tally.put(tally.scores, name, v, rows, symmetric_divergence(statistics, i, j))


def entropy(probabilities: Probabilities) -> NDArray[np.float64]:
    """[N], of probabilities [N, C], in nats."""
    p = probabilities.astype(np.float64)
    return np.asarray(-(p * np.log(np.maximum(p, 1e-30))).sum(1))


def answers(
    statistics: HeadStatistics, manifest: Manifest, original: Probabilities | None
) -> Iterator[tuple[str, Probabilities, list[str]]]:
    """(answerer, probabilities [N, C], who answered each picture) of the original, then of every router."""
    if original is not None and ORIGINAL not in manifest.heads:
        yield ORIGINAL, original, []
    for name in routers(manifest):
        routed = route(statistics, manifest, name)
        yield name, routed.probabilities, routed.head
