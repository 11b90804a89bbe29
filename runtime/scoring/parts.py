"""Where scores go: numbered Parquet files of so many rows each, and the record of what they are of.

A part is written under another name and renamed, so that after a kill at any moment each part is whole or absent, and
absent parts are what is left to do. The record, written before the first part, refuses to go on with anything else.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import pyarrow
import pyarrow.json
import pyarrow.parquet
from pydantic import Field, ValidationError

from ..errors import ConfigError, ServerError
from ..values import Strict
from .inputs import Input
from .work import PART_ROWS, Row, Scored

RECORD = "_score.json"
"""Readers of a folder of Parquet files pass over names that begin with an underscore or a dot."""
PART = "part-{:06d}.parquet"
TYPES = {
    "path": pyarrow.string(),
    "key": pyarrow.string(),
    "label": pyarrow.string(),
    "class_id": pyarrow.int64(),
    "head": pyarrow.string(),
    "confidence": pyarrow.float32(),
    "predictive_entropy": pyarrow.float32(),
    "mutual_information": pyarrow.float32(),
    "set": pyarrow.list_(pyarrow.string()),
    "abstain": pyarrow.bool_(),
    "shift_score": pyarrow.float32(),
    "error": pyarrow.string(),
}
GUARANTEES = ("set", "abstain", "shift_score")
"""Columns of bundles that have them."""


class ScoredBundle(Strict):
    """By what was scored."""

    path: str
    name: str
    version: str
    digest: str
    """SHA-256 of its manifest."""
    router: str
    """In force."""
    guarantees: bool
    coverage: float | None = None
    """As asked for; None is the bundle's own."""
    max_risk: float | None = None


class ScoredInput(Strict):
    """What was scored."""

    path: str
    kind: Literal["folder", "table", "shards"]
    pictures: Annotated[int, Field(ge=1)]
    fingerprint: str
    """See Input.fingerprint."""


class Totals(Strict):
    """What came of it, once all is done."""

    unreadable: int
    """Pictures without an answer."""


class Record(Strict):
    """_score.json."""

    format: Literal["trivium-score"] = "trivium-score"
    schema_version: Literal[1] = 1
    bundle: ScoredBundle
    input: ScoredInput
    part_rows: Annotated[int, Field(ge=1)]
    finished: Totals | None = None


class Parts:
    """The output directory, of this process alone while it is open.

    Args:
        out: a directory that is absent, empty, or was begun with the same bundle, router and input.
        part_rows: rows of a file; None is what was begun with, or PART_ROWS.

    Raises: ConfigError where the directory is of something else, cannot be written or is in use.
    """

    def __init__(self, out: Path, bundle: ScoredBundle, pictures: Input, part_rows: int | None) -> None:
        self.out = out
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise ConfigError(f"--out {out}: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise ConfigError(f"--out {out}: another run writes there now") from None
        try:
            begun = self._begun()
            described = ScoredInput(
                path=pictures.where, kind=pictures.kind, pictures=len(pictures), fingerprint=pictures.fingerprint()
            )
            if begun is not None:
                refuse_another(out, begun, bundle, described, part_rows)
            rows = begun.part_rows if begun else part_rows or PART_ROWS
            self.record = begun or Record(bundle=bundle, input=described, part_rows=rows)
            kind = described.kind
            columns = [
                (name, type_)
                for name, type_ in TYPES.items()
                if (name != "key" or kind == "shards") and (name not in GUARANTEES or bundle.guarantees)
            ]
            self._schema = pyarrow.schema(columns)
            self.unreadable = 0
            self._missing = [number for number in range(-(-len(pictures) // rows)) if not self._is_there(number)]
            self._open: dict[int, dict[int, list[Row]]] = {}
            if begun is None:
                self._write_record()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let another run have the directory."""
        os.close(self._lock)

    def missing(self) -> list[range]:
        """The pictures of each part that is not there, by number."""
        return [self._rows(number) for number in self._missing]

    def add(self, scored: Scored) -> None:
        """Take a chunk's rows, and write the part that they complete.

        Raises: ServerError where the disk refuses.
        """
        number = scored.start // self.record.part_rows
        chunks = self._open.setdefault(number, {})
        chunks[scored.start] = scored.rows
        if sum(map(len, chunks.values())) == len(self._rows(number)):
            self._write(number, [row for _, rows in sorted(chunks.items()) for row in rows])
            del self._open[number]

    def finish(self) -> None:
        """Note in the record that all parts are there."""
        self.record = self.record.model_copy(update={"finished": Totals(unreadable=self.unreadable)})
        self._write_record()

    def _rows(self, number: int) -> range:
        rows = self.record.part_rows
        return range(number * rows, min((number + 1) * rows, self.record.input.pictures))

    def _is_there(self, number: int) -> bool:
        part = self.out / PART.format(number)
        if not part.exists():
            return False
        try:
            errors = pyarrow.parquet.ParquetFile(part).read(columns=["error"])["error"]
        except (OSError, pyarrow.ArrowException, KeyError):
            errors = None
        if errors is None or len(errors) != len(self._rows(number)):
            raise ConfigError(f"{part}: not as it was written; remove it, and it is made again")
        self.unreadable += len(errors) - errors.null_count
        return True

    def _write(self, number: int, rows: list[Row]) -> None:
        table = _table(rows, self._schema)
        part = PART.format(number)
        try:
            pyarrow.parquet.write_table(table, self.out / f".{part}")
            self._rename(part)
        except OSError as error:
            raise ServerError(f"{self.out / part}: cannot be written: {error.strerror or error}") from None
        self.unreadable += sum(row.error is not None for row in rows)

    def _write_record(self) -> None:
        try:
            (self.out / f".{RECORD}").write_text(self.record.model_dump_json(indent=2) + "\n", encoding="utf-8")
            self._rename(RECORD)
        except OSError as error:
            raise ConfigError(f"--out {self.out}: {error.strerror}") from None

    def _rename(self, name: str) -> None:
        """Give a finished file its name, for good: a power failure leaves it whole or absent."""
        with open(self.out / f".{name}", "rb") as file:
            os.fsync(file.fileno())
        os.rename(self.out / f".{name}", self.out / name)
        os.fsync(self._lock)

    def _begun(self) -> Record | None:
        """The record of the run that began here; None in an empty directory."""
        path = self.out / RECORD
        if not path.exists():
            if any(name != f".{RECORD}" for name in os.listdir(self.out)):
                raise ConfigError(f"--out {self.out}: holds other files; choose a new or empty directory")
            return None
        try:
            return Record.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            raise ConfigError(f"{path}: no record of trivium score that this release reads") from None


def refuse_another(
    out: Path, begun: Record, bundle: ScoredBundle, pictures: ScoredInput, part_rows: int | None
) -> None:
    """Raise ConfigError where a directory was begun with something else."""
    was = begun.bundle
    if was.digest != bundle.digest:
        reason = f"holds scores by another bundle ({was.name} version {was.version}, sha256 {was.digest[:12]})"
    elif was.router != bundle.router:
        reason = f"was begun with --router {was.router}, not {bundle.router}"
    elif (was.coverage, was.max_risk) != (bundle.coverage, bundle.max_risk):
        begun_with = [("--coverage", was.coverage), ("--max-risk", was.max_risk)]
        given = " ".join(f"{flag} {level:g}" for flag, level in begun_with if level is not None)
        reason = f"was begun with {given or 'the own coverage and risk of the bundle'}"
    elif begun.input.fingerprint != pictures.fingerprint:
        reason = f"was begun with {begun.input.pictures} pictures of {begun.input.path}, and this input is not the same"
    elif part_rows not in (None, begun.part_rows):
        reason = f"was begun with --part-rows {begun.part_rows}"
    else:
        return
    raise ConfigError(f"--out {out}: {reason}; choose another directory")


def chunks(parts: list[range], size: int, at_once: int) -> Iterator[range]:
    """Numbers of pictures to score at a time; none lies in two parts.

    Args:
        size: the most of them.
        at_once: chunks that are under way; towards the end they become smaller, so that all end at nearly one time.
    """
    left = sum(map(len, parts))
    for rows in parts:
        start = rows.start
        while start < rows.stop:
            stop = min(start + size, start + max(1, left // (2 * at_once)), rows.stop)
            yield range(start, stop)
            left -= stop - start
            start = stop


def _table(rows: list[Row], schema: pyarrow.Schema) -> pyarrow.Table:
    """Through JSON: given a list, Arrow first loads pandas, where it is installed, to see whether the list is one of
    its columns, and that takes longer than all that is written here."""
    given = ({name: value for name in schema.names if (value := getattr(row, name)) is not None} for row in rows)
    text = "\n".join(map(json.dumps, given)).encode()
    return pyarrow.json.read_json(
        io.BytesIO(text),
        pyarrow.json.ReadOptions(use_threads=False, block_size=len(text) + 1),
        pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="error"),
    )
