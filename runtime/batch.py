"""From queued pictures to predictions: one by one, or those of several requests in one run of the engine."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from time import perf_counter_ns
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import wire
from .cpus import usable_cpus
from .errors import TriviumError
from .predictor import Prediction, Predictor, Timings
from .scheduler import Job, Pictures

Decoded = tuple[NDArray[np.uint8], int]
"""A picture, and the nanoseconds that it took to decode."""


class Asked(NamedTuple):
    """What a job's pictures are."""

    predictor: Predictor
    request: wire.Request
    starts: list[int] | None
    """Takes when each picture was taken up, where anyone asks."""

    def take_up(self, index: int) -> None:
        """Note that a picture's turn has come."""
        if self.starts is not None:
            self.starts[index] = perf_counter_ns()

    def decoded(self, index: int) -> Decoded:
        """A picture as the model's input. Raises: InvalidPicture, that names the picture among several."""
        if self.request.images is not None:
            return self.request.images[index], 0
        return self.predictor.decode_one(self.request.encoded, index)


class Batch:
    """Answers pictures of one predictor together: decodes them side by side, runs the engine once, routes each.

    What is wrong with one picture is that picture's error alone.
    """

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._decoders = ThreadPoolExecutor(usable_cpus(), "decoder")

    def __call__(self, pictures: Pictures[Prediction]) -> list[Prediction | TriviumError]:
        """An answer or an error for each picture, in their order. Raises: EngineError, for all of them."""
        for job, index in pictures:
            job.payload.take_up(index)
        # arrays are there already: threads would only hand them on
        several = any(job.payload.request.images is None for job, _ in pictures)
        decoded = list((self._decoders.map if several else map)(_decode, pictures))
        images = [found[0] for found in decoded if not isinstance(found, TriviumError)]
        rows, share = self._predictor.run_together(np.stack(images)) if images else ([], 0)
        statistics = iter(rows)
        answers: list[Prediction | TriviumError] = []
        for (job, _), found in zip(pictures, decoded, strict=True):
            if isinstance(found, TriviumError):
                answers.append(found)
                continue
            timings = Timings(found[1], job.queue_ns, share)
            try:
                request: wire.Request = job.payload.request
                answers.append(self._predictor.answer(next(statistics), request.router, timings, request.terms))
            except TriviumError as error:
                answers.append(error)
        return answers


def answer(job: Job[Prediction], index: int) -> Prediction:
    """One picture of a request. Raises: TriviumError."""
    asked: Asked = job.payload
    asked.take_up(index)
    image, decode_ns = asked.decoded(index)
    request = asked.request
    return asked.predictor.infer(image, request.router, request.terms, decode_ns=decode_ns, queue_ns=job.queue_ns)


def _decode(picture: tuple[Job[Prediction], int]) -> Decoded | TriviumError:
    job, index = picture
    try:
        asked: Asked = job.payload
        return asked.decoded(index)
    except TriviumError as error:
        return error
