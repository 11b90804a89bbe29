"""Data sets as others keep them: WebDataset shards (tar files) and Hugging Face datasets (Arrow tables).

Both are read at random, by place, instead of streamed: an epoch's order, a resumed run, splits and limits are then the
same as with folders of pictures. A shard is walked through once, header by header; the places of its pictures are kept.
Nothing in a shard or table is unpickled or executed; pictures are decoded like any other.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trivium.runtime.errors import ConfigError, MissingExtra
from trivium.runtime.preprocess import DEFAULT_LIMITS
from trivium.runtime.shards import PICTURES, expanded, grouped, open_shard

from . import fashion_mnist
from .sources import DIRECTORIES, Entry, Part, Skipped, Source, Split, cached, store

LABEL_BYTES = 1024
"""Of a sample's .cls, at most."""
SPLIT_OF = {name: split for split, names in DIRECTORIES.items() for name in names}


@dataclass(frozen=True, slots=True)
class TarEntry(Entry):
    """A picture in an uncompressed tar file."""

    shard: Path
    offset: int

    def __str__(self) -> str:
        return f"{self.shard.parent / self.name}"

    def read(self) -> bytes:
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(min(self.size, DEFAULT_LIMITS.max_bytes + 1))


@dataclass(frozen=True, slots=True)
class RowEntry(Entry):
    """A picture in a row of a table: its bytes there, or in the file that the row names."""

    source: str
    table: Any
    row: int

    def __str__(self) -> str:
        return f"{self.source}: {self.name}"

    def read(self) -> bytes:
        (cell,) = self.table[self.row].values()
        if cell["bytes"] is not None:
            content: bytes = cell["bytes"]
            return content
        with open(cell["path"], "rb") as file:
            return file.read(DEFAULT_LIMITS.max_bytes + 1)


class Sample(NamedTuple):
    """A picture of a shard and the text of its .cls."""

    entry: TarEntry
    label: str


def webdataset_source(root: Path) -> Source:
    """WebDataset shards: root is a tar file, a directory of them, or a pattern with stars and braces.

    Samples are a picture (jpg, jpeg, png, webp) and a cls: a class's number, whose name is that line of a classes.txt
    beside the shards if there is one, or a class's name. Shards whose file's name begins with a split's (val-0003.tar)
    or whose directory has it (test/0003.tar) are that split's, others are for training.

    Raises: ConfigError naming the shard.
    """
    shards: dict[Split, list[Path]] = {}
    for path in expanded(root):
        shards.setdefault(_split_of(path), []).append(path)
    if "train" not in shards:
        raise ConfigError(f"{root}: shards of {', '.join(shards)} but none to train on")
    skipped: list[Skipped] = []
    samples: dict[Split, list[Sample]] = {}
    with ThreadPoolExecutor(4) as pool:
        for split, paths in shards.items():
            samples[split] = []
            for found, faults in pool.map(_indexed, paths):
                samples[split] += found
                skipped += faults
    labels = {split: [sample.label for sample in found] for split, found in samples.items()}
    classes, numbers = _classes(labels, shards["train"][0].parent / "classes.txt", str(root))
    parts: dict[Split, Part] = {}
    for split, each in samples.items():
        entries: list[Entry] = [sample.entry for sample in each]
        parts[split] = Part(entries, numbers[split])
    return Source(f"pictures in the shards {root.name}", classes, parts, skipped)


def huggingface_source(root: Path) -> Source:
    """A Hugging Face dataset: a directory (save_to_disk, or Parquet files), or a name on the hub.

    It has one column of pictures and one of class labels (or a column "label" of numbers or names).
    Raises: MissingExtra, ConfigError.
    """
    try:
        import datasets
    except ModuleNotFoundError:
        raise MissingExtra("data.kind: huggingface needs datasets; run: pip install 'trivium[datasets]'") from None
    try:
        saved = any((root / name).is_file() for name in ("dataset_dict.json", "state.json"))
        loaded = datasets.load_from_disk(str(root)) if saved else datasets.load_dataset(str(root))
    except Exception as error:
        # The package raises errors of its own, of the hub's client, of pyarrow and of the file system.
        raise ConfigError(f"{root}: no Hugging Face dataset that can be had here ({_line(error)})") from None
    tables = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    if unknown := sorted(name for name in tables if name not in SPLIT_OF):
        raise ConfigError(f"{root}: split {unknown[0]!r} is none of {', '.join(SPLIT_OF)}")
    if not any(SPLIT_OF[name] == "train" for name in tables):
        raise ConfigError(f"{root}: the splits {', '.join(tables)} but none to train on")
    entries: dict[Split, list[Entry]] = {}
    labels: dict[Split, list[str]] = {}
    names: list[str] | None = None
    for key, table in tables.items():
        split = SPLIT_OF[key]
        if split in entries:
            raise ConfigError(f"{root}: more than one split for {split}")
        image, label = _columns(table.features, f"{root}: {key}")
        names = getattr(table.features[label], "names", None) or names
        given = table[label][:]
        if all(each == -1 for each in given):  # how a test's withheld labels are marked
            continue
        labels[split] = [str(each) for each in given]
        pictures = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        changed = max((Path(file["filename"]).stat().st_mtime_ns for file in table.cache_files), default=0)
        entries[split] = [
            RowEntry(f"{key}/{row}", size, changed, str(root), pictures, row)
            for row, size in enumerate(_sizes(pictures))
        ]
    classes, numbers = _classes(labels, names, str(root))
    parts = {split: Part(found, numbers[split]) for split, found in entries.items()}
    return Source(f"the Hugging Face dataset {root.name}", classes, parts)


def _split_of(shard: Path) -> Split:
    """By the first word of the file's name, else by its directory's name."""
    word = re.match("[a-z]*", shard.name.lower())
    named = SPLIT_OF.get(word[0] if word else "")
    return named or SPLIT_OF.get(shard.parent.name.lower(), "train")


def _indexed(shard: Path) -> tuple[list[Sample], list[Skipped]]:
    """As _samples, from what was kept where the shard is as it was then."""
    try:
        status = shard.stat()
    except OSError as error:
        raise ConfigError(f"{shard}: {error.strerror}") from None
    key = hashlib.sha256(f"{shard.absolute()}\0{status.st_size}\0{status.st_mtime_ns}".encode()).hexdigest()
    index = fashion_mnist.cache_directory() / "shards" / f"{key}.json"
    known: Any = cached(index)
    if known is None:
        samples, skipped = _samples(shard, status.st_mtime_ns)
        rows = [(each.entry.name, each.entry.size, each.entry.offset, each.label) for each in samples]
        store(index, {"samples": rows, "skipped": skipped})
        return samples, skipped
    changed = status.st_mtime_ns
    samples = [
        Sample(TarEntry(name, size, changed, shard, offset), label) for name, size, offset, label in known["samples"]
    ]
    return samples, [Skipped(*row) for row in known["skipped"]]


def _samples(shard: Path, changed: int) -> tuple[list[Sample], list[Skipped]]:
    """The samples of a shard in its order, and what is none."""
    found: list[Sample] = []
    skipped: list[Skipped] = []
    try:
        with open_shard(shard) as tar:
            for key, fields in grouped(tar):
                place = f"{shard}/{key}"
                pictures = [fields[field] for field in PICTURES if field in fields]
                if len(pictures) != 1 or "cls" not in fields:
                    what = f"{len(pictures)} pictures ({', '.join(PICTURES)})" if "cls" in fields else "no .cls"
                    skipped.append(Skipped(place, f"{what}; a sample has one picture and a .cls"))
                    continue
                file = tar.extractfile(fields["cls"])
                label = file.read(LABEL_BYTES).decode("utf-8").strip() if file else ""
                if not label:
                    raise ConfigError(f"{place}.cls: empty")
                picture = pictures[0]
                name = f"{shard.name}/{picture.name}"
                entry = TarEntry(name, picture.size, changed, shard, picture.offset_data)
                found.append(Sample(entry, label))
    except UnicodeDecodeError:
        raise ConfigError(f"{shard}: a .cls in it is no text") from None
    return found, skipped


def _columns(features: Any, where: str) -> tuple[str, str]:
    """The names of the columns of pictures and of labels."""
    kinds = {name: type(feature).__name__ for name, feature in features.items()}
    found = []
    for kind, usual in (("Image", "image"), ("ClassLabel", "label")):
        named = [name for name in kinds if kinds[name] == kind]
        if usual in named or (kind == "ClassLabel" and not named and usual in kinds):
            named = [usual]
        if len(named) != 1:
            raise ConfigError(
                f"{where}: {len(named)} columns of kind {kind} among {', '.join(kinds)}: name one {usual!r}"
            )
        found.append(named[0])
    return found[0], found[1]


def _sizes(pictures: Any) -> Iterator[int]:
    import pyarrow.compute

    for block in pictures.with_format("arrow").iter(1000):
        column = block.column(0)
        sizes = pyarrow.compute.binary_length(pyarrow.compute.struct_field(column, "bytes")).to_pylist()
        paths = pyarrow.compute.struct_field(column, "path").to_pylist()
        for size, path in zip(sizes, paths, strict=True):
            if size is None:
                size = Path(path).stat().st_size if path and Path(path).is_file() else -1
            yield size


def _classes(
    labels: dict[Split, list[str]], names: Path | Sequence[str] | None, where: str
) -> tuple[list[str], dict[Split, NDArray[np.int64]]]:
    """Names of the classes and each split's labels as indices into them.

    Numbers mean the names given (a file holds one a line), else they are the names; names are sorted.
    """
    given = None
    if isinstance(names, Path):
        if names.is_file():
            given = [line.strip() for line in names.read_text(encoding="utf-8").splitlines() if line.strip()]
    elif names is not None:
        given = list(names)
    seen = set(labels["train"])
    numbered = all(label.isdecimal() for label in seen)
    if given is not None and numbered:
        classes, index = given, {str(number): number for number in range(len(given))}
    else:
        classes = sorted(seen, key=int) if numbered else sorted(seen)
        index = {name: number for number, name in enumerate(classes)}
    found: dict[Split, NDArray[np.int64]] = {}
    for split, texts in labels.items():
        if unknown := sorted(set(texts) - index.keys()):
            known = f"{len(given)} names are given" if given is not None and numbered else "it does not occur in train"
            raise ConfigError(f"{where}: class {unknown[0]!r} of the {split} split: {known}")
        found[split] = np.array([index[text] for text in texts], np.int64)
    return classes, found


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
