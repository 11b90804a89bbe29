"""Sources of labelled pictures: class folders, CSV manifests, and data sets known by name; splits by seed."""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trivium.runtime.errors import ConfigError, InvalidPicture
from trivium.runtime.preprocess import DEFAULT_LIMITS, SUFFIXES, open_picture

from . import fashion_mnist, renditions

Split = Literal["train", "calibration", "test"]
SPLITS: tuple[Split, ...] = ("train", "calibration", "test")
DIRECTORIES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "calibration": ("val", "valid", "validation", "calibration"),
    "test": ("test", "testing"),
}
"""Names under which a folder or a CSV column may give each split."""
PATIENCE = 5000
"""Files that are checked without a word."""


class Skipped(NamedTuple):
    """A file that is no usable picture."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Entry(ABC):
    """An encoded picture inside something larger: its name there, its size in bytes, when that changed (ns)."""

    name: str
    size: int
    changed: int

    @abstractmethod
    def __str__(self) -> str:
        """Name and place, for people."""

    @abstractmethod
    def read(self) -> bytes:
        """The encoded picture.

        Raises: OSError.
        """


Files = list[Path] | list[Entry] | list[Path | Entry]


@dataclass(frozen=True)
class Part:
    """The pictures of one split: uint8 [N, h, w] or [N, h, w, 3], or N files or entries, with labels int64 [N]."""

    pictures: NDArray[np.uint8] | Files
    labels: NDArray[np.int64]

    def take(self, indices: NDArray[np.int64]) -> Part:
        if isinstance(self.pictures, list):
            return Part([self.pictures[i] for i in indices], self.labels[indices])
        return Part(self.pictures[indices], self.labels[indices])

    def digest(self, root: Path | None) -> str:
        """SHA-256 over labels and contents, or for files over labels, relative paths and sizes in bytes."""
        hasher = hashlib.sha256(self.labels.astype("<i8").tobytes())
        if isinstance(self.pictures, list):
            for path in self.pictures:
                if isinstance(path, Entry):
                    name = path.name
                else:
                    name = (path.relative_to(root) if root and path.is_relative_to(root) else path).as_posix()
                hasher.update(f"{name}\0{_size(path)}\0".encode())
        else:
            hasher.update(repr(self.pictures.shape).encode())
            hasher.update(np.ascontiguousarray(self.pictures).data)
        return hasher.hexdigest()


@dataclass(frozen=True)
class Source:
    """All that a data set holds before splits are drawn and limits applied."""

    name: str
    classes: list[str]
    parts: dict[Split, Part]
    skipped: list[Skipped] = field(default_factory=list)

    def only(self, classes: Sequence[str]) -> Source:
        """The pictures of some classes, labelled in the order given.

        Raises: ConfigError for a class that the data has not, or one named twice.
        """
        for name in classes:
            if name not in self.classes:
                near = difflib.get_close_matches(name, self.classes, n=1, cutoff=0.0)
                raise ConfigError(f"data.classes: {self.name} has no class {name!r}; nearest: {near[0]}")
        if len(set(classes)) != len(classes):
            raise ConfigError("data.classes: names must differ")
        labels = np.array([list(classes).index(name) if name in classes else -1 for name in self.classes])
        parts = dict[Split, Part]()
        for split, part in self.parts.items():
            chosen = part.take(np.flatnonzero(labels[part.labels] >= 0))
            parts[split] = Part(chosen.pictures, labels[chosen.labels])
        return Source(self.name, list(classes), parts, self.skipped)


def fashion_mnist_source(root: Path | None) -> Source:
    """Fashion-MNIST from its IDX files; train and test parts.

    Raises: ConfigError with the command that obtains it.
    """
    directory = _obtained(fashion_mnist.locate(root), "Fashion-MNIST", "fashion-mnist", root)
    parts = fashion_mnist.read(directory)
    return Source(
        "Fashion-MNIST (Zalando Research, MIT licence)",
        fashion_mnist.CLASSES,
        {
            "train": Part(parts.train_pictures, parts.train_labels),
            "test": Part(parts.test_pictures, parts.test_labels),
        },
    )


def renditions_source(root: Path | None) -> Source:
    """The emoji renditions; train, calibration and test parts.

    Raises: ConfigError with the command that makes them.
    """
    directory = _obtained(renditions.locate(root), "emoji renditions", "renditions", root)
    return replace(folder_source(directory), name="emoji renditions (several authors and licences, see its README.md)")


def _obtained(found: Path | None, what: str, command: str, root: Path | None) -> Path:
    if found is None:
        where = f" in {root}" if root else ""
        out = f" --out {root}" if root else ""
        raise ConfigError(f"no {what}{where}; run: trivium data {command}{out}")
    return found


def digits_source() -> Source:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: real, but only a stand-in for a data set."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise ConfigError("the digits need scikit-learn; run: pip install 'trivium[eval]'") from None
    bunch = load_digits()
    pictures = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    part = Part(pictures, bunch.target.astype(np.int64))
    return Source("scikit-learn's digits (UCI, CC BY 4.0)", [str(digit) for digit in range(10)], {"train": part})


def folder_source(root: Path) -> Source:
    """An ImageFolder: root/train/CLASS/..., and val and test beside it where they exist; or root/CLASS/... alone.

    Raises: ConfigError where there is no such structure or the splits' classes differ.
    """
    if not root.is_dir():
        raise ConfigError(f"{root}: no such directory")
    found: dict[Split, Path] = {}
    for split, aliases in DIRECTORIES.items():
        present = [root / name for name in aliases if (root / name).is_dir()]
        if len(present) > 1:
            raise ConfigError(f"{root}: both {present[0].name} and {present[1].name} for the {split} split")
        if present:
            found[split] = present[0]
    if "train" not in found:
        if found:
            raise ConfigError(f"{root}: {', '.join(path.name for path in found.values())} but no train directory")
        found = {"train": root}
    classes = _subdirectories(found["train"])
    if not classes:
        raise ConfigError(f"{found['train']}: no class directories in it")
    parts: dict[Split, Part] = {}
    skipped: list[Skipped] = []
    for split, directory in found.items():
        names = _subdirectories(directory)
        if unknown := sorted(set(names) - set(classes)):
            raise ConfigError(f"{directory}: class {unknown[0]!r} is not among the classes of {found['train']}")
        paths: list[Path] = []
        labels: list[int] = []
        for name in names:
            for path in _files(directory / name):
                if path.suffix.lower() in SUFFIXES:
                    paths.append(path)
                    labels.append(classes.index(name))
                else:
                    skipped.append(Skipped(str(path), f"suffix {path.suffix!r} is none of {', '.join(SUFFIXES)}"))
        parts[split] = Part(paths, np.array(labels, np.int64))
    return Source(f"pictures in {root.name}", classes, parts, skipped)


def csv_source(path: Path) -> Source:
    """A CSV manifest with the columns path, label and perhaps split; paths are relative to the manifest.

    Raises: ConfigError naming the line.
    """
    by_name = {name: split for split, names in DIRECTORIES.items() for name in names}
    rows: dict[Split, list[tuple[Path, str]]] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if not {"path", "label"} <= set(reader.fieldnames or []):
                raise ConfigError(f"{path}: the first line must name the columns path, label and perhaps split")
            for row in reader:
                where = f"{path}: line {reader.line_num}"
                if not row["path"] or not row["label"]:
                    raise ConfigError(f"{where}: path or label is empty")
                name = (row.get("split") or "train").lower()
                if name not in by_name:
                    raise ConfigError(f"{where}: unknown split {name!r}, use train, val or test")
                rows.setdefault(by_name[name], []).append((path.parent / row["path"], row["label"]))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    if "train" not in rows:
        raise ConfigError(f"{path}: no row of the train split")
    classes = sorted({label for _, label in rows["train"]})
    index = {label: i for i, label in enumerate(classes)}
    parts: dict[Split, Part] = {}
    for split, pairs in rows.items():
        if unknown := sorted({label for _, label in pairs} - set(classes)):
            raise ConfigError(f"{path}: label {unknown[0]!r} of the {split} split does not occur in train")
        parts[split] = Part([file for file, _ in pairs], np.array([index[label] for _, label in pairs], np.int64))
    return Source(f"pictures listed in {path.name}", classes, parts)


def verified(source: Source) -> Source:
    """The source without its unreadable files, which join `skipped`. Every file is decoded once, as serving
    would; the verdict is cached by path, size and time of change."""
    files = [path for part in source.parts.values() if isinstance(part.pictures, list) for path in part.pictures]
    if not files:
        return source
    key = hashlib.sha256()
    for path in files:
        place = path if isinstance(path, Entry) else path.absolute()
        key.update(f"{place}\0{_size(path)}\0{_changed(path)}\0".encode(errors="surrogateescape"))
    cache = fashion_mnist.cache_directory() / "verified" / f"{key.hexdigest()}.json"
    reasons = cached(cache)
    if reasons is None:
        if len(files) > PATIENCE:
            print(f"decoding {len(files)} pictures once to find unreadable ones", file=sys.stderr)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            verdicts = pool.map(fault, files, chunksize=32)
            reasons = {str(path): reason for path, reason in zip(files, verdicts, strict=True) if reason}
        store(cache, reasons)
    parts: dict[Split, Part] = {}
    for split, part in source.parts.items():
        good = np.array([i for i, path in enumerate(part.pictures) if str(path) not in reasons], np.int64)
        parts[split] = part.take(good)
    bad = [Skipped(path, reason) for path, reason in sorted(reasons.items())]
    return Source(source.name, source.classes, parts, source.skipped + bad)


def fault(path: Path | Entry) -> str | None:
    """Why a file is no picture that the runtime decodes, in a few words; None for a good one."""
    try:
        if isinstance(path, Path) and path.exists() and not path.is_file():
            return "not a regular file"
        open_file(path)
    except FileNotFoundError:
        return "no such file"
    except OSError as error:
        return error.strerror or type(error).__name__
    except InvalidPicture as error:
        return str(error)
    return None


def open_file(path: Path | Entry) -> Image.Image:
    """Decode a picture as serving would: RGB, upright, in its own size.

    Raises: InvalidPicture, OSError.
    """
    if isinstance(path, Entry):
        return open_picture(path.read())
    with path.open("rb") as file:
        return open_picture(file.read(DEFAULT_LIMITS.max_bytes + 1))


def stratified_order(labels: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """A random order of the indices whose every prefix holds the classes in nearly the same shares as the whole."""
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(labels))
    place = np.empty(len(labels), np.float64)
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        place[members] = (np.arange(len(members)) + generator.random()) / len(members)
    return np.argsort(place, kind="stable")


def split_parts(
    parts: dict[Split, Part], seed: int, calibration: float | int, test: float | int, root: Path | None
) -> dict[Split, Part]:
    """All three splits: those that the source lacks are held out of its training part, test first, by a stratified
    draw. A float is a share of the training part, an int a count.

    Raises: ConfigError where a split comes out empty.
    """
    whole = parts["train"]
    order = stratified_order(whole.labels, seed)
    result = dict(parts)
    taken = 0
    wanted: Sequence[tuple[Split, float | int]] = (("test", test), ("calibration", calibration))
    for split, amount in wanted:
        if split not in parts:
            count = amount if isinstance(amount, int) else round(amount * len(order))
            result[split] = whole.take(np.sort(order[taken : taken + count]))
            taken += count
    result["train"] = whole.take(np.sort(order[taken:]))
    for split in SPLITS:
        if len(result[split].labels) == 0:
            where = f"{root}: " if root else ""
            raise ConfigError(f"{where}no usable picture in the {split} split (training part: {len(order)} pictures)")
    return {split: result[split] for split in SPLITS}


def _subdirectories(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))


def _files(directory: Path) -> list[Path]:
    """All files below a directory, sorted, hidden ones left out."""
    found = []
    for place, folders, names in os.walk(directory):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(place) / name for name in sorted(names) if not name.startswith(".")]
    return found


def _size(path: Path | Entry) -> int:
    if isinstance(path, Entry):
        return path.size
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _changed(path: Path | Entry) -> int:
    if isinstance(path, Entry):
        return path.changed
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return -1


def cached(path: Path) -> dict[str, Any] | None:
    """A JSON object that was stored, or None."""
    try:
        document = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def store(path: Path, document: dict[str, Any]) -> None:
    """Keep a JSON object in the cache directory, where that can be written."""
    scratch = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps(document), encoding="utf-8", errors="surrogateescape")
        scratch.replace(path)
    except OSError:
        # The cache only saves time: a read-only home is no reason to stop.
        scratch.unlink(missing_ok=True)
