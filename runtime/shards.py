"""WebDataset shards: uncompressed tar files, in which neighbours of one name make a sample."""

from __future__ import annotations

import glob
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ConfigError, MissingExtra
from .preprocess import SUFFIXES

PICTURES = tuple(suffix.removeprefix(".") for suffix in SUFFIXES)
"""Fields of a sample that are pictures."""


def expanded(root: Path) -> list[Path]:
    """The shards that a tar file's name, a directory or a pattern with stars and braces stands for.

    Raises: MissingExtra; ConfigError where there is none.
    """
    try:
        from braceexpand import braceexpand
    except ModuleNotFoundError:
        raise MissingExtra("WebDataset shards need braceexpand; run: pip install 'trivium[shards]'") from None
    if root.is_dir():
        found = sorted(path for path in root.rglob("*.tar") if path.is_file())
        if not found:
            raise ConfigError(f"{root}: no .tar file in it")
        return found
    found = []
    for pattern in braceexpand(str(root)):
        matches = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
        if not matches:
            raise ConfigError(f"{pattern}: no such shard")
        found += [Path(match) for match in matches]
    return found


@contextmanager
def open_shard(shard: Path) -> Iterator[tarfile.TarFile]:
    """An uncompressed tar file, read in this block.

    Raises: ConfigError naming the shard, in the block too.
    """
    try:
        with tarfile.open(shard, "r:") as tar:
            yield tar
    except tarfile.TarError as error:
        line = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(f"{shard}: no uncompressed tar file, or a damaged one ({line})") from None
    except OSError as error:
        raise ConfigError(f"{shard}: {error.strerror or error}") from None


def grouped(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Neighbours of one name up to its first dot, which make a sample, by what follows the dot."""
    key, fields = "", dict[str, tarfile.TarInfo]()
    for member in tar:
        name = re.fullmatch(r"((?:.*/)?[^./][^./]*)\.([^/]*)", member.name)
        if not member.isreg() or member.issparse() or not name:
            continue
        if name[1] != key and fields:
            yield key, fields
            fields = {}
        key = name[1]
        fields[name[2].lower()] = member
    if fields:
        yield key, fields
