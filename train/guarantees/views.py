"""Views of calibration pictures, drawn from a declared mixture, and what a bundle says of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trivium.kernels import HeadStatistics
from trivium.runtime.cpus import usable_cpus
from trivium.runtime.engine import Backend
from trivium.runtime.errors import ConfigError, EngineError
from trivium.runtime.predictor import Predictor

from ..calibration.calibrate import CHUNK, SHIFTS, augmented
from ..calibration.observe import CLEAN
from ..data.pictures import Pictures
from ..evaluation.tally import labels_for
from ..shifts.corruptions import CALIBRATION_CORRUPTIONS, SEVERITIES, corrupt
from ..shifts.strengths import STRENGTHS

COMPONENTS: dict[str, tuple[str, ...]] = {
    CLEAN: (CLEAN,),
    "corrupted": CALIBRATION_CORRUPTIONS,
    "augmented": tuple(SHIFTS),
    **{name: (name,) for name in STRENGTHS},
}
"""Part of a mixture -> the kinds of view that it stands for, in even shares; corruptions in all severities alike."""
SHIFTED = {"corrupted": len(CALIBRATION_CORRUPTIONS), "augmented": len(SHIFTS)}
"""Shares, up to their sum, of the views by which a shift detector learns what shifted is: every kind alike."""
RUN = 16
"""Pictures that one thread asks the engine about at a time."""


@dataclass(frozen=True)
class Views:
    """What a bundle says of N pictures, in random order, of each in one view that was drawn by the mixture.

    The first three are of that view: calibration on them holds for a stream of the same mixture.
    """

    statistics: HeadStatistics
    labels: NDArray[np.int64]
    kind: NDArray[np.str_]
    """[N]: "clean", or the name of the corruption or augmentation."""
    clean: HeadStatistics
    """Of the same pictures as they are."""
    shifted: HeadStatistics | None = None
    """Of the same pictures under a corruption or augmentation each; None where nobody asked for it."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: ArrayLike | slice) -> Views:
        """Some of the pictures; rows is a mask [N], indices or a slice."""
        chosen = rows if isinstance(rows, slice) else np.asarray(rows)

        def some(statistics: HeadStatistics) -> HeadStatistics:
            return HeadStatistics(*(column[chosen] for column in statistics))

        shifted = None if self.shifted is None else some(self.shifted)
        return Views(some(self.statistics), self.labels[chosen], self.kind[chosen], some(self.clean), shifted)


def look(
    predictor: Predictor,
    pictures: Pictures,
    mixture: Mapping[str, float],
    *,
    seed: int = 0,
    limit: int | None = None,
    order: NDArray[np.int64] | None = None,
    shifted: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Views:
    """Ask a bundle about pictures as a server would, row by row: each in a view drawn by the mixture, and as it is.

    A picture's view depends on the mixture, the seed and its place in the split, but for augmentations, which are
    drawn for many pictures together.

    Args:
        mixture: shares of COMPONENTS, as parse_mixture gives them.
        limit: pictures used at most.
        order: the pictures, in this order; None: all, in an order drawn by seed.
        shifted: give every picture a shifted view too.
        progress: told (pictures done, pictures in all).

    Raises: ConfigError where the data has a class that the model does not know; EngineError where an answer is not a
        number.
    """
    labels = labels_for(pictures, predictor.manifest.classes)
    if order is None:
        order = np.random.Generator(np.random.Philox(seed)).permutation(len(pictures))
    order = order[:limit]
    kinds, severities = draw_kinds(mixture, len(pictures), seed)
    shift_kinds, shift_severities = draw_kinds(even(SHIFTED), len(pictures), seed + 1)
    found: list[tuple[HeadStatistics, ...]] = []
    workers = usable_cpus() if predictor.engine.device == "cpu" else 1
    with ThreadPoolExecutor(workers, thread_name_prefix="look") as pool:
        for start in range(0, len(order), CHUNK):
            rows = order[start : start + CHUNK]
            images = pictures.batch(rows).permute(0, 2, 3, 1).contiguous().numpy()
            clean = ask(predictor.engine, images, pool)
            drawn = HeadStatistics(*(column.copy() for column in clean))
            if (moved := np.flatnonzero(kinds[rows] != CLEAN)).size:
                view = shift(images[moved], kinds[rows[moved]], severities[rows[moved]], rows[moved], seed)
                for column, values in zip(drawn, ask(predictor.engine, view, pool), strict=True):
                    column[moved] = values
            seen = [drawn, clean]
            if shifted:
                view = shift(images, shift_kinds[rows], shift_severities[rows], rows, seed + 1)
                seen.append(ask(predictor.engine, view, pool))
            found.append(tuple(seen))
            if progress is not None:
                progress(start + len(rows), len(order))
    if not found:
        raise ConfigError("there are no pictures to calibrate on")
    whole = [
        HeadStatistics(*(np.concatenate(column) for column in zip(*part, strict=True)))
        for part in zip(*found, strict=True)
    ]
    return Views(whole[0], labels[order], kinds[order], whole[1], whole[2] if shifted else None)


def draw_kinds(mixture: Mapping[str, float], count: int, seed: int) -> tuple[NDArray[np.str_], NDArray[np.int64]]:
    """Kind and severity, each [count], of every picture's view: independent draws, as in a stream of the mixture."""
    chances = np.array([share / len(COMPONENTS[name]) for name, share in mixture.items() for _ in COMPONENTS[name]])
    kinds = np.array([kind for name in mixture for kind in COMPONENTS[name]])
    draws = np.random.Generator(np.random.Philox([seed, 0x517])).random((count, 2))
    place = np.searchsorted(np.cumsum(chances / chances.sum()), draws[:, 0], side="right")
    # a draw beyond the rounded sum belongs to the last kind that has a share
    place = np.minimum(place, np.flatnonzero(chances)[-1])
    severity = np.asarray(SEVERITIES)[np.floor(draws[:, 1] * len(SEVERITIES)).astype(np.int64)]
    return kinds[place], severity


def shift(
    images: NDArray[np.uint8],
    kinds: NDArray[np.str_],
    severities: NDArray[np.int64],
    place: NDArray[np.int64],
    seed: int,
) -> NDArray[np.uint8]:
    """Pictures uint8 [N, H, W, 3], each in the view named; a corruption draws from (seed, its name, place) alone, an
    augmentation for all pictures together from the seed and the first one's place."""
    out = images.copy()
    for name in np.unique(kinds):
        rows = np.flatnonzero(kinds == name)
        if name in SHIFTS:
            out[rows] = augmented(images[rows], SHIFTS[str(name)], seed, int(place[rows[0]]))
        elif name != CLEAN:
            for row in rows:
                # one by one, so that no two pictures share a draw: shared noise would not be exchangeable
                out[row] = corrupt(images[row : row + 1], str(name), int(severities[row]), seed, int(place[row]))[0]
    return out


def ask(engine: Backend, images: NDArray[np.uint8], pool: ThreadPoolExecutor) -> HeadStatistics:
    """Statistics of pictures uint8 [N, H, W, 3], bit for bit those of a server on the same engine.

    Raises: EngineError.
    """
    pieces = [images[start : start + RUN] for start in range(0, len(images), RUN)]
    parts = list(pool.map(engine.run, pieces))
    statistics = HeadStatistics(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    if not all(np.isfinite(column).all() for column in statistics):
        raise EngineError("the model's answer to a calibration picture is not a number")
    return statistics


def parse_mixture(text: str) -> dict[str, float]:
    """A mixture from "clean=0.5,corrupted=0.5", without the parts that have no share.

    Raises: ConfigError for an unknown part, one named twice, and shares that do not sum to 1.
    """
    mixture: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = (word.strip() for word in part.partition("="))
        if name not in COMPONENTS:
            raise ConfigError(f"--mix: {name[:100]!r} is none of {', '.join(COMPONENTS)}")
        if name in mixture:
            raise ConfigError(f"--mix: {name} stands twice")
        try:
            share = float(value) if equals else math.nan
        except ValueError:
            share = math.nan
        if not 0 <= share <= 1:
            raise ConfigError(f"--mix: the share of {name} must be a number from 0 to 1, as in clean=0.5,corrupted=0.5")
        mixture[name] = share
    if abs(sum(mixture.values()) - 1) > 1e-6:
        raise ConfigError(f"--mix {text}: the shares sum to {sum(mixture.values()):g}, not to 1")
    return {name: share for name, share in mixture.items() if share}


def even(weights: Mapping[str, float]) -> dict[str, float]:
    """The weights as shares."""
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}
