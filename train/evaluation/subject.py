"""What is evaluated: a bundle through the runtime's own engine, or a checkpoint through torch, behind one interface."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from trivium.kernels import HeadStatistics
from trivium.runtime.bundle import MANIFEST, Manifest, open_bundle
from trivium.runtime.cpus import usable_cpus
from trivium.runtime.engine import Engine
from trivium.runtime.errors import ConfigError
from trivium.runtime.router import route

from ..calibration.calibrate import calibrate
from ..calibration.comparison import provisional
from ..calibration.observe import Observer
from ..checkpoint import CHECKPOINT, load_student
from ..data.pictures import NAMED, load_described

if TYPE_CHECKING:
    from trivium.runtime.scoring.actors import ActorEngine

Probabilities = NDArray[np.float32]


class Subject(Protocol):
    """A model under evaluation. `manifest` names heads, classes, preprocessing and router."""

    kind: Literal["bundle", "checkpoint"]
    path: str
    manifest: Manifest
    original_is: str | None
    """What answers as the original classifier, in words; None where the model holds none."""

    def answer(self, images: NDArray[np.uint8]) -> tuple[HeadStatistics, Probabilities | None]:
        """uint8 [N, H, W, 3] -> statistics, and the original's probabilities [N, C] where the model holds it."""

    def original(self, images: NDArray[np.uint8]) -> Probabilities:
        """uint8 [N, H, W, 3] -> what this model answers [N, C] when it stands for the original classifier."""

    def data_record(self) -> dict[str, Any] | None:
        """Pictures.describe() of the data that the model was trained on; None where its record cannot find them."""


class BundleSubject:
    """A bundle; what stands for the original is its default router's answer.

    Args:
        engine: "ray" runs it in actors on Ray's cluster.
    """

    kind: Literal["bundle", "checkpoint"] = "bundle"
    original_is: str | None = None

    def __init__(self, path: str, engine: Literal["local", "ray"] = "local") -> None:
        bundle = open_bundle(path)
        self.path, self.manifest = path, bundle.manifest
        self._engine: Engine | ActorEngine
        if engine == "ray":
            from trivium.runtime.scoring.actors import ActorEngine

            self._engine = ActorEngine(path)
        else:
            self._engine = Engine(bundle, threads=usable_cpus())

    def answer(self, images: NDArray[np.uint8]) -> tuple[HeadStatistics, Probabilities | None]:
        return self._engine.run_batch(images), None

    def original(self, images: NDArray[np.uint8]) -> Probabilities:
        return route(self._engine.run_batch(images), self.manifest).probabilities

    def data_record(self) -> dict[str, Any] | None:
        data = self.manifest.provenance.get("data")
        # A bundle names no directories, so only what is found without one can be opened again.
        kind = (data.get("spec") or {}).get("kind") if isinstance(data, dict) else None
        if kind not in NAMED:
            return None
        return data


class CheckpointSubject:
    """A checkpoint, calibrated on the whole of its calibration split; export leaves a part to the guarantees."""

    kind: Literal["bundle", "checkpoint"] = "checkpoint"
    original_is: str | None = "the checkpoint's own original classifier"

    def __init__(
        self, path: str, *, as_original: bool = False, progress: Callable[[int, int], None] | None = None
    ) -> None:
        student, meta = load_student(path)
        self.path, self.meta, self.model = path, meta, student
        observer = Observer(student, meta.preprocessing, meta.dropout)
        self._observer = observer
        self.manifest = provisional(meta.classes, meta.heads, meta.preprocessing, meta.dropout, None, meta.name)
        if not as_original:
            pictures = load_described(meta.data, "calibration", meta.preprocessing)
            settings, record = calibrate(student, pictures, meta.dropout, progress=progress)
            self._temperature = [record.temperature[head] for head in meta.heads]
            known: dict[str, Any] = {
                "router": settings,
                "calibration": record,
                "provenance": {"recipe": meta.recipe, "data": meta.data},
                "training": {"costs": {stage: cost.model_dump() for stage, cost in meta.costs.items()}},
            }
            self.manifest = self.manifest.model_copy(update=known)

    def answer(self, images: NDArray[np.uint8]) -> tuple[HeadStatistics, Probabilities | None]:
        features, original = self._observer.look(images)
        return self._observer.statistics(features, self._temperature), original

    def original(self, images: NDArray[np.uint8]) -> Probabilities:
        return self._observer.original(images)

    def data_record(self) -> dict[str, Any] | None:
        return self.meta.data


def open_subject(
    path: str,
    *,
    as_original: bool = False,
    progress: Callable[[int, int], None] | None = None,
    engine: Literal["local", "ray"] = "local",
) -> BundleSubject | CheckpointSubject:
    """A bundle or a checkpoint, told apart by the file that names it.

    Args:
        as_original: only its answers as an original classifier are wanted, so nothing is calibrated.
        progress: of a checkpoint's calibration, told (pictures done, pictures in all).
        engine: of a bundle.

    Raises: ConfigError where the path is neither, or a checkpoint that is to run on Ray; BundleError and
        CheckpointError where it is damaged; MissingExtra.
    """
    root = Path(path)
    if (root / CHECKPOINT).exists() and not (root / MANIFEST).exists():
        if engine == "ray":
            raise ConfigError(f"{path}: a checkpoint; only a bundle runs on Ray: export it first")
        return CheckpointSubject(os.fspath(path), as_original=as_original, progress=progress)
    if (root / MANIFEST).exists():
        return BundleSubject(os.fspath(path), engine)
    raise ConfigError(f"{path}: neither a bundle ({MANIFEST}) nor a checkpoint ({CHECKPOINT}) is there")
