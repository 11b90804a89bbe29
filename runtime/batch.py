"""From queued pictures to predictions: one by one, or those of several requests in one run of the engine."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from time import perf_counter_ns
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trivium.kernels import HeadStatistics

from . import wire
from .cpus import usable_cpus
from .errors import TriviumError
from .predictor import Prediction, Predictor, Timings
from .scheduler import Job

Decoded = tuple[NDArray[np.uint8], int]
"""A picture, and the nanoseconds that it took to decode."""


class Asked(NamedTuple):
    """What a job's pictures are."""

    predictor: Predictor
    request: wire.Request
    starts: list[int] | None
    """Takes when each picture was taken up, where anyone asks."""


class Batch:
    """Answers pictures of one predictor together: decodes them side by side, runs the engine once, routes each.

    What is wrong with one picture is that picture's error alone.
    """

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._decoders = ThreadPoolExecutor(usable_cpus(), "decoder")

    def __call__(self, pictures: list[tuple[Job[Prediction], int]]) -> list[Prediction | TriviumError]:
        """An answer or an error for each picture, in their order. Raises: EngineError, for all of them."""
        now = perf_counter_ns()
        for job, index in pictures:
            starts = job.payload.starts
            if starts is not None:
                starts[index] = now
        decoded = list(self._decoders.map(self._decode, pictures))
        images = [found[0] for found in decoded if not isinstance(found, TriviumError)]
        if not images:
            return [found for found in decoded if isinstance(found, TriviumError)]
        start = perf_counter_ns()
        statistics = self._predictor.engine.run(np.stack(images))
        share = (perf_counter_ns() - start) // len(images)
        answers: list[Prediction | TriviumError] = []
        row = 0
        for (job, _), found in zip(pictures, decoded, strict=True):
            if isinstance(found, TriviumError):
                answers.append(found)
                continue
            mine = HeadStatistics(*(values[row : row + 1] for values in statistics))
            row += 1
            timings = Timings(found[1], job.queue_ns, share)
            try:
                answers.append(self._predictor.answer(mine, job.payload.request.router, timings))
            except TriviumError as error:
                answers.append(error)
        return answers

    def _decode(self, picture: tuple[Job[Prediction], int]) -> Decoded | TriviumError:
        job, index = picture
        try:
            return decode(self._predictor, job.payload.request, index)
        except TriviumError as error:
            return error


def answer(job: Job[Prediction], index: int) -> Prediction:
    """One picture of a request. Raises: TriviumError."""
    asked: Asked = job.payload
    if asked.starts is not None:
        asked.starts[index] = perf_counter_ns()
    image, decode_ns = decode(asked.predictor, asked.request, index)
    return asked.predictor.infer(image, asked.request.router, decode_ns=decode_ns, queue_ns=job.queue_ns)


def decode(predictor: Predictor, request: wire.Request, index: int) -> Decoded:
    """A picture of a request as the model's input. Raises: InvalidPicture, that names the picture among several."""
    if request.images is not None:
        return request.images[index], 0
    start = perf_counter_ns()
    try:
        image = predictor.decode(request.encoded[index])
    except TriviumError as error:
        if request.size == 1:
            raise
        raise type(error)(f"picture {index}: {error}") from None
    return image, perf_counter_ns() - start
