"""The pictures that guarantees are verified on, and what a bundle says of them, kept on disk between runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from trivium.kernels import HeadStatistics
from trivium.runtime.errors import ConfigError
from trivium.runtime.predictor import Predictor

from ..data.pictures import Pictures
from ..data.shift_sets import ShiftSet
from ..shifts.corruptions import TEST_CORRUPTIONS
from .views import Views, even, look

UNSEEN = even(dict.fromkeys(TEST_CORRUPTIONS, 1.0))
"""The mixture of corruptions that calibration may never draw."""


class Source(NamedTuple):
    """One part of the pool."""

    name: str
    pictures: Pictures
    digest: str


class Pool(NamedTuple):
    """What a bundle says of N pictures."""

    declared: Views
    """Each in a view drawn by the mixture that calibration declares, as it is, and shifted."""
    unseen: HeadStatistics
    """Each under one of UNSEEN, in the same order."""
    unseen_kind: NDArray[np.str_]


def sources_of(pictures: Pictures, sets: Sequence[ShiftSet], classes: Sequence[str]) -> list[Source]:
    """A split, and shift sets of the model's classes.

    Raises: ConfigError for a set in which not every class of the model may be answered, or that is corrupted already.
    """
    found = [Source(pictures.split, pictures, pictures.describe()["digest"])]
    for each in sets:
        if each.cells is not None or not np.array_equal(each.answers, np.arange(len(each.answers))):
            raise ConfigError(f"--shift {each.name}: a set to be pooled holds the model's classes, uncorrupted")
        # its labels count the model's classes, whatever its folders are called
        own = copy(each.pictures)
        own.classes = list(classes)
        found.append(Source(each.name, own, each.digest))
    return found


def look_at(
    predictor: Predictor,
    sources: Sequence[Source],
    mixture: Mapping[str, float],
    seed: int,
    limit: int | None,
    cache: Path,
    progress: Callable[[int, int], None] | None = None,
) -> Pool:
    """Ask a bundle about every picture of the pool, or read from `cache` what it said the last time.

    Args:
        limit: pictures of each source at most, drawn by seed.
        cache: an .npz file, which is used only where it was made from the same model, pictures and arguments.

    Raises: as look.
    """
    model = predictor.manifest.model_dump(mode="json", include={"files", "dropout", "preprocessing"})
    given = [model, [source.digest for source in sources], dict(mixture), seed, limit]
    key = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()
    found = read(cache, key)
    if found is None:
        found = _look(predictor, sources, mixture, seed, limit, progress)
        write(cache, key, found)
    return found


def _look(
    predictor: Predictor,
    sources: Sequence[Source],
    mixture: Mapping[str, float],
    seed: int,
    limit: int | None,
    progress: Callable[[int, int], None] | None,
) -> Pool:
    counts = [min(len(source.pictures), limit or len(source.pictures)) for source in sources]
    declared, unseen = [], []
    for i, source in enumerate(sources):

        def done(count: int, _: int, begun: int = 2 * sum(counts[:i])) -> None:
            if progress is not None:
                progress(begun + count, 2 * sum(counts))

        def done_again(count: int, whole: int, begun: int = 2 * sum(counts[:i])) -> None:
            done(whole + count, whole, begun)

        one = source.pictures
        declared.append(look(predictor, one, mixture, seed=seed, limit=limit, progress=done))
        unseen.append(look(predictor, one, UNSEEN, seed=seed, limit=limit, shifted=False, progress=done_again))
    return Pool(
        Views(
            _join([each.statistics for each in declared]),
            np.concatenate([each.labels for each in declared]),
            np.concatenate([each.kind for each in declared]),
            _join([each.clean for each in declared]),
            _join([each.shifted for each in declared if each.shifted is not None]),
        ),
        _join([each.statistics for each in unseen]),
        np.concatenate([each.kind for each in unseen]),
    )


def _join(parts: Sequence[HeadStatistics]) -> HeadStatistics:
    return HeadStatistics(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def write(path: Path, key: str, pool: Pool) -> None:
    """Raises: ConfigError."""
    declared = pool.declared
    assert declared.shifted is not None
    statistics = {
        "declared": declared.statistics, "clean": declared.clean, "shifted": declared.shifted, "unseen": pool.unseen
    }  # fmt: skip
    columns = {f"{name}.{i}": column for name, each in statistics.items() for i, column in enumerate(each)}
    part = path.with_suffix(".part.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(part, key=key, labels=declared.labels, kind=declared.kind, unseen_kind=pool.unseen_kind, **columns)  # type: ignore[arg-type]
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def read(path: Path, key: str) -> Pool | None:
    """None where there is no such file, or it was made from something else."""
    try:
        with np.load(path) as file:
            if str(file["key"]) != key:
                return None
            width = len(HeadStatistics._fields)
            statistics, clean, shifted, unseen = (
                HeadStatistics(*(file[f"{name}.{i}"] for i in range(width)))
                for name in ("declared", "clean", "shifted", "unseen")
            )
            return Pool(Views(statistics, file["labels"], file["kind"], clean, shifted), unseen, file["unseen_kind"])
    except (OSError, ValueError, KeyError, BadZipFile):
        return None
