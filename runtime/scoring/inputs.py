"""What is scored: the pictures of a folder, of a table of paths, or of WebDataset shards, by number."""

from __future__ import annotations

import glob
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import pyarrow
import pyarrow.csv
import pyarrow.parquet

from ..errors import ConfigError, InvalidRequest
from ..predict import pictures
from ..shards import PICTURES, expanded, grouped, open_shard
from .work import Picture

COLUMN = "path"
"""Of a table, the one that is read."""


class Input(ABC):
    """Pictures by number.

    Args:
        where: what the user named.
    """

    kind: Literal["folder", "table", "shards"]

    def __init__(self, where: str) -> None:
        self.where = where

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def rows(self, start: int, stop: int) -> list[Picture]:
        """Pictures number `start` up to before `stop`."""

    @abstractmethod
    def state(self) -> Iterator[str]:
        """Of every file its name, size and time of change: what must be the same for a run to go on."""

    def fingerprint(self) -> str:
        """SHA-256, hexadecimal, of the kind, the order and the state of all files."""
        hasher = hashlib.sha256(self.kind.encode())
        for line in self.state():
            hasher.update(line.encode("utf-8", "surrogateescape") + b"\0")
        return hasher.hexdigest()


class Files(Input):
    """Picture files below a folder, or named by a table."""

    def __init__(self, where: str, kind: Literal["folder", "table"], root: Path, paths: Sequence[str]) -> None:
        super().__init__(where)
        self.kind = kind
        self._root, self._paths = root, paths

    def __len__(self) -> int:
        return len(self._paths)

    def rows(self, start: int, stop: int) -> list[Picture]:
        return [Picture(_text(path), None, self._file(path), 0, -1) for path in self._paths[start:stop]]

    def state(self) -> Iterator[str]:
        for path in self._paths:
            yield f"{path} {_stamp(self._file(path))}"

    def _file(self, path: str) -> str:
        return os.path.join(self._root, path) if path else ""


class Shards(Input):
    """The pictures of the samples in tar files; a sample may have several, or none."""

    kind = "shards"

    def __init__(self, where: str, shards: Sequence[Path]) -> None:
        super().__init__(where)
        self._shards = shards
        self._rows: list[Picture] = []
        for shard in shards:
            with open_shard(shard) as tar:
                for key, fields in grouped(tar):
                    for member in (fields[name] for name in PICTURES if name in fields):
                        path = _text(f"{shard.name}/{member.name}")
                        self._rows.append(Picture(path, _text(key), str(shard), member.offset_data, member.size))

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, start: int, stop: int) -> list[Picture]:
        return self._rows[start:stop]

    def state(self) -> Iterator[str]:
        for shard in self._shards:
            yield f"{shard.name} {_stamp(str(shard))}"


def open_input(where: str, root: Path | None) -> Input:
    """A folder of pictures or shards, a .parquet or .csv table, a .tar shard or a pattern of them.

    Args:
        root: what a table's paths are relative to, if not to the table.

    Raises: ConfigError, InvalidRequest where there is no picture; MissingExtra.
    """
    suffix = Path(where).suffix.lower()
    if root is not None and suffix not in (".parquet", ".csv"):
        raise ConfigError(f"--root goes with a .parquet or .csv file, and {where} is none")
    found: Input
    if os.path.isdir(where):
        try:
            below = os.path.join(Path(where), "")
            found = Files(where, "folder", Path(where), [path.removeprefix(below) for path in pictures([where])])
        except InvalidRequest:
            if next(Path(where).rglob("*.tar"), None) is None:
                raise
            found = Shards(where, expanded(Path(where)))
    elif suffix in (".parquet", ".csv"):
        found = Files(where, "table", root or Path(where).parent, _paths(where, suffix))
    elif suffix == ".tar":
        found = Shards(where, expanded(Path(where)))
    elif not (os.path.exists(where) or glob.has_magic(where)):
        raise ConfigError(f"{where}: no such file or folder")
    else:
        raise ConfigError(f"{where}: neither a folder nor a .parquet, .csv or .tar file")
    if not len(found):
        raise ConfigError(f"{where}: no picture in it")
    return found


def _paths(table: str, suffix: str) -> list[str]:
    """A table's column of paths; "" where it has none.

    Raises: ConfigError.
    """
    try:
        with open(table, "rb") as file:
            if suffix == ".parquet":
                parquet = pyarrow.parquet.ParquetFile(file)
                names = parquet.schema_arrow.names
                column = parquet.read(columns=[COLUMN])[COLUMN] if COLUMN in names else None
            else:
                convert = pyarrow.csv.ConvertOptions(column_types={COLUMN: pyarrow.string()})
                read = pyarrow.csv.read_csv(file, convert_options=convert)
                names = read.column_names
                column = read[COLUMN] if COLUMN in names else None
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise ConfigError(f"{table}: cannot be read: {reason}") from None
    if column is None:
        raise ConfigError(f"{table}: no column {COLUMN!r}; it has: {', '.join(names) or 'none'}")
    try:
        return [path or "" for path in column.cast(pyarrow.string()).to_pylist()]
    except pyarrow.ArrowException:
        raise ConfigError(f"{table}: the column {COLUMN!r} holds {column.type}, not text") from None


def _text(name: str) -> str:
    """A file's name as text that every reader of Parquet takes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _stamp(file: str) -> str:
    try:
        status = os.stat(file)
    except (OSError, ValueError):
        return "absent"
    return f"{status.st_size} {status.st_mtime_ns}"
