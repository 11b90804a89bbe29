"""What scoring processes are given, and what they give back; light, so that they can be started before all else is."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..errors import InvalidPicture

if TYPE_CHECKING:
    from ..preprocess import Limits

PART_ROWS = 1000
"""Of an output file, where nothing else is asked for."""


class Picture(NamedTuple):
    """Where a picture's bytes are."""

    path: str
    """What the output calls it: relative to the folder, as the table has it, or SHARD/MEMBER."""
    key: str | None
    """Of a shard's sample."""
    file: str
    """"" where the table has no path."""
    offset: int
    size: int
    """Bytes from the offset on; -1 for all."""

    def read(self, limits: Limits) -> bytes:
        """The encoded picture, or one byte more than the limit.

        Raises: InvalidPicture, which does not name the picture.
        """
        if not self.file:
            raise InvalidPicture("the table has no path here")
        wanted = limits.max_bytes + 1 if self.size < 0 else min(self.size, limits.max_bytes + 1)
        try:
            with open(self.file, "rb") as file:
                file.seek(self.offset)
                return file.read(wanted)
        except (OSError, ValueError) as error:  # a NUL in a name is a ValueError
            raise InvalidPicture(getattr(error, "strerror", None) or str(error)) from None


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
