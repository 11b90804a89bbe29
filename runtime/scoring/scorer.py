"""What every scoring process does: read, decode and answer the pictures of a chunk, one by one on one core."""

from __future__ import annotations

from os import getpid
from socket import gethostname
from time import process_time, thread_time

import numpy as np
from numpy.typing import NDArray

from .. import memory
from ..bundle import printable
from ..errors import DigestMismatch, EngineError, InvalidPicture
from ..predict import answering, set_of
from ..predictor import Predictor, Timings
from ..promises import terms
from .work import Chunk, Picture, Row, Scored, Task


class Scorer:
    """A bundle on one core.

    Raises: BundleError, EngineError, MissingExtra; DigestMismatch where the bundle is not the one that was meant.
    """

    def __init__(self, task: Task) -> None:
        memory.before_load()
        self._predictor = Predictor.load(task.bundle)
        if self._predictor.digest != task.digest:
            raise DigestMismatch(f"{task.bundle}: not the bundle that this run began with")
        manifest = self._predictor.manifest
        self._router, self._heads, self._classes = task.router, manifest.heads, manifest.classes
        self._terms = terms(manifest, task.router, task.coverage, task.max_risk)
        self._name = f"{gethostname()}:{getpid()}"
        memory.after_load()
        memory.use_huge_pages()

    def score(self, chunk: Chunk) -> Scored:
        """Raises: EngineError where the engine fails; what is wrong with a picture stands in its row."""
        # step by step: the code and data of each stay in the caches
        start = thread_time()
        images = [self._decoded(picture) for picture in chunk.pictures]
        decoded = thread_time()
        found = [image if isinstance(image, str) else self._predictor.engine.run(image[None]) for image in images]
        compute = thread_time() - decoded
        rows: list[Row] = []
        for picture, statistics in zip(chunk.pictures, found, strict=True):
            if isinstance(statistics, str):
                rows.append(Row(picture.path, picture.key, error=statistics))
                continue
            try:
                answer = self._predictor.answer(statistics, self._router, Timings(), self._terms)
            except EngineError as error:
                rows.append(Row(picture.path, picture.key, error=str(error)))
                continue
            own = answering(answer.head, self._heads)
            rows.append(
                Row(
                    path=picture.path,
                    key=picture.key,
                    label=answer.label,
                    class_id=answer.class_id,
                    head=answer.head,
                    confidence=float(answer.probabilities[answer.class_id]),
                    predictive_entropy=_mean(answer.predictive_entropy, own),
                    mutual_information=_mean(answer.mutual_information, own),
                    set=None if answer.prediction_set is None else [self._classes[i] for i in set_of(answer)],
                    abstain=answer.abstain,
                    shift_score=answer.shift_score,
                )
            )
        return Scored(chunk.start, rows, decoded - start, compute, process_time(), self._name)

    def _decoded(self, picture: Picture) -> NDArray[np.uint8] | str:
        """The model's input, or what is wrong with the picture."""
        try:
            return self._predictor.decode(picture.read(self._predictor.limits))
        except InvalidPicture as error:
            return printable(str(error))


def _mean(values: NDArray[np.float32], heads: list[int]) -> float:
    """Over some heads, mostly one."""
    return float(values[heads[0]] if len(heads) == 1 else values[heads].mean())
