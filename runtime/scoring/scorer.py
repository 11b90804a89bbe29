"""What every scoring process does: read, decode and answer the pictures of a chunk, one by one on one core."""

from __future__ import annotations

from os import getpid
from socket import gethostname
from time import process_time, thread_time
from typing import NamedTuple

from .. import memory
from ..bundle import printable
from ..errors import DigestMismatch, EngineError, InvalidPicture
from ..predict import answering, set_of
from ..predictor import Predictor, Timings
from ..promises import terms
from .inputs import Picture


class Task(NamedTuple):
    """What a scoring process is told once."""

    bundle: str
    digest: str
    """SHA-256 of its manifest, which holds those of all its files."""
    router: str
    coverage: float | None = None
    """Of the prediction sets, where not the bundle's own; and the risk below which it need not abstain."""
    max_risk: float | None = None


class Chunk(NamedTuple):
    """Pictures that are scored at a time."""

    start: int
    """Number of the first."""
    pictures: list[Picture]


class Row(NamedTuple):
    """The answer to one picture, or why there is none; the columns of the output."""

    path: str
    key: str | None = None
    label: str | None = None
    class_id: int | None = None
    head: str | None = None
    confidence: float | None = None
    """Probability of the answer."""
    predictive_entropy: float | None = None
    """Nats, of the head that answered; the mean where several did."""
    mutual_information: float | None = None
    set: list[str] | None = None
    """Classes of the prediction set, the likeliest first, of bundles with guarantees."""
    abstain: bool | None = None
    shift_score: float | None = None
    error: str | None = None


class Scored(NamedTuple):
    """A chunk's rows, and what they cost."""

    start: int
    rows: list[Row]
    decode: float
    """CPU seconds of reading and decoding."""
    compute: float
    """CPU seconds in the engine."""
    total: float
    """CPU seconds of the process since its start."""
    process: str
    """Which one, as HOST:PID."""


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
        rows: list[Row] = []
        decode = compute = 0.0
        for picture in chunk.pictures:
            start = thread_time()
            try:
                image = self._predictor.decode(picture.read(self._predictor.limits))
            except InvalidPicture as error:
                decode += thread_time() - start
                rows.append(Row(picture.path, picture.key, error=printable(str(error))))
                continue
            decoded = thread_time()
            statistics = self._predictor.engine.run(image[None])
            computed = thread_time()
            decode, compute = decode + decoded - start, compute + computed - decoded
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
                    predictive_entropy=float(answer.predictive_entropy[own].mean()),
                    mutual_information=float(answer.mutual_information[own].mean()),
                    set=None if answer.prediction_set is None else [self._classes[i] for i in set_of(answer)],
                    abstain=answer.abstain,
                    shift_score=answer.shift_score,
                )
            )
        return Scored(chunk.start, rows, decode, compute, process_time(), self._name)
