"""Shift sets: pictures of the model's classes from elsewhere, as users have them on disk.

Class folders and manifests of any name, and the public sets of ImageNet in the shape in which they are distributed:

- ImageNet-C (Hendrycks and Dietterich 2019): CORRUPTION/SEVERITY/CLASS/*, perhaps one folder deeper; already 224 x 224,
  so neither enlarged nor cropped.
- ImageNet-R (Hendrycks et al. 2021) and ImageNet-A (2021): 200 WordNet ids; only these may be answered.
- ImageNet-Sketch (Wang et al. 2019): WordNet ids. ImageNet-V2 (Recht et al. 2019): folders 0 to 999.
- ObjectNet (Barbu et al. 2019): folders of its own; mappings/*.json say which ImageNet classes each stands for, folders
  that stand for none are left out, and two pixels of red border are cut off. Any class may be answered; one right class
  of several is right.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trivium.runtime.bundle import Preprocessing
from trivium.runtime.errors import ConfigError
from trivium.runtime.preprocess import SUFFIXES

from .pictures import DataSpec, Pictures
from .sources import DIRECTORIES, SPLITS, Part, Source, csv_source, folder_source, verified

READERS = {
    "imagenet-c": r"imagenet[-_]?c",
    "imagenet-r": r"imagenet[-_]?r",
    "imagenet-a": r"imagenet[-_]?a",
    "imagenet-sketch": r"imagenet[-_]?sketch",
    "imagenet-v2": r"imagenet[-_]?v2",
    "objectnet": r"objectnet",
}
"""Reader -> how the name of a set that it reads begins."""
RESTRICTED = ("imagenet-r", "imagenet-a")
BORDER = 2
"""Pixels of red that ObjectNet's pictures have on each side, cut off as Wortsman et al. (2022) do."""
WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class ShiftSet:
    """Pictures, the answers to choose between, and what is right.

    pictures: their labels number the answers, not the model's classes.
    answers: int64 [C], the answer that each class of the model counts as; -1 where it may not be given.
    digest: SHA-256 of the pictures' labels, names and sizes.
    cells: [N, 3] of ImageNet-C, else None: place in `corruptions`, severity, number of the picture that was corrupted.
    """

    name: str
    reader: str
    source: str
    pictures: Pictures
    answers: NDArray[np.int64]
    digest: str
    note: str = ""
    corruptions: tuple[str, ...] = ()
    cells: NDArray[np.int64] | None = None

    def read(self, probabilities: NDArray[np.floating[Any]]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The model's probabilities [N, C] -> the answer given [N], and the probability of each answer [N, A].

        The most probable class that may be answered decides, as in the sets' papers; the classes of one answer share
        its probability, and what is left of the whole is scaled up to 1.
        """
        open_ = np.flatnonzero(self.answers >= 0)
        p = np.asarray(probabilities, np.float64)[:, open_]
        p = p / np.maximum(p.sum(1, keepdims=True), 1e-30)
        belongs = self.answers[open_, None] == np.arange(self.answers.max() + 1)
        return self.answers[open_][p.argmax(1)], p @ belongs

    @property
    def classes(self) -> int:
        """How many answers are right for some picture."""
        return len(np.unique(self.pictures.labels))


class _Unframed(Pictures):
    """ObjectNet's pictures without their border."""

    def _open(self, index: int) -> Image.Image:
        picture = super()._open(index)
        return picture.crop((BORDER, BORDER, picture.width - BORDER, picture.height - BORDER))


def open_shift(
    text: str,
    classes: Sequence[str],
    preprocessing: Preprocessing,
    *,
    mapping: Path | None = None,
    count: int | None = None,
    seed: int = 0,
) -> ShiftSet:
    """A shift set from "NAME=PATH": the name picks the reader, or else the shape of the tree does.

    Args:
        classes: of the model.
        mapping: a JSON file for ObjectNet, folder -> class or classes by name, WordNet id or index; None looks for the
            set's own.
        count: of ImageNet-C, pictures of each corruption and severity, the same ones of each, drawn by seed; None: all.

    Raises: ConfigError in one line, also where the set's classes are not the model's.
    """
    name, equals, place = text.partition("=")
    root = Path(place)
    if not equals or not name or not place:
        raise ConfigError(f"--shift {text}: give it as NAME=PATH, such as imagenet-r=/data/imagenet-r")
    if not root.exists():
        raise ConfigError(f"--shift {text}: no such file or directory")
    reader = reader_of(name, root)
    if reader == "imagenet-c":
        return _corrupted(name, root, classes, preprocessing, count, seed)
    source, part = _read(root / "images" if reader == "objectnet" and (root / "images").is_dir() else root)
    if reader == "objectnet":
        return _objectnet(name, root, source, part, classes, preprocessing, mapping)
    index = match(source.classes, classes, str(root))
    answers = np.arange(len(classes))
    if reader in RESTRICTED:
        answers = np.full(len(classes), -1)
        answers[index] = np.arange(len(index))
        index = np.arange(len(index))
        note = f"answers restricted to the set's {len(index)} classes, as in its paper"
    else:
        note = "" if len(index) == len(classes) else f"{len(index)} of the model's {len(classes)} classes occur"
    part = Part(part.pictures, index[part.labels])
    pictures = _pictures(source, part, root, preprocessing)
    return ShiftSet(name, reader, place, pictures, answers, part.digest(root), _noted(note, source))


def beside(pictures: Pictures) -> list[str]:
    """NAME=PATH of the shift sets that a data set brings with it: the folders of its folder "shifts"."""
    root = pictures.root / "shifts" if pictures.root is not None else None
    return [f"{path.name}={path}" for path in _directories(root)] if root is not None and root.is_dir() else []


def reader_of(name: str, root: Path) -> str:
    """The reader that a set's name begins with, else the one its tree asks for."""
    for reader, pattern in READERS.items():
        if re.match(pattern + r"(?![a-z0-9])", name.lower()):
            return reader
    if root.is_dir() and _cells(root):
        return "imagenet-c"
    return "manifest" if root.is_file() else "class folders"


def match(folders: Sequence[str], classes: Sequence[str], where: str, by_index: bool = True) -> NDArray[np.int64]:
    """The model's class of each folder: by name, else by WordNet id, else by index, whichever fits them all.

    Raises: ConfigError in one line where none does.
    """
    names = _index_by_name(classes)
    tries = [[names.get(_plain(folder), -1) for folder in folders]]
    if all(WNID.fullmatch(folder) for folder in folders):
        by_id = _index_by_wnid(tuple(classes))
        tries.append([by_id.get(folder, -1) for folder in folders])
    if by_index and all(folder.isdecimal() for folder in folders):
        tries.append([int(folder) if int(folder) < len(classes) else -1 for folder in folders])
    best = max(tries, key=lambda found: sum(i >= 0 for i in found))
    missing = [folder for folder, i in zip(folders, best, strict=True) if i < 0]
    if missing:
        raise ConfigError(
            f"{where}: {len(missing)} of {len(folders)} classes are none of the model's {len(classes)}, by name"
            f"{', WordNet id or index' if by_index else ' or WordNet id'}, say {missing[0]!r}"
        )
    if repeated := [i for i, times in Counter(best).items() if times > 1]:
        raise ConfigError(f"{where}: several of its classes are the model's class {classes[repeated[0]]!r}")
    return np.array(best, np.int64)


def _read(root: Path) -> tuple[Source, Part]:
    """A tree of class folders or a manifest, its unreadable files left out: of a divided one the test part, else val,
    else all there is."""
    order = SPLITS[::-1]
    if root.is_dir():
        divided = [root / name for split in order[:-1] for name in DIRECTORIES[split]]
        source = folder_source(next((path for path in divided if path.is_dir()), root))
    else:
        source = csv_source(root)
    part = next(source.parts[split] for split in order if split in source.parts)
    source = verified(Source(source.name, source.classes, {"test": part}, source.skipped))
    part = source.parts["test"]
    if len(part.labels) == 0:
        raise ConfigError(f"{root}: no usable picture in it")
    present = np.unique(part.labels)
    classes = [source.classes[i] for i in present]
    part = Part(part.pictures, np.searchsorted(present, part.labels))
    return Source(source.name, classes, {"test": part}, source.skipped), part


def _pictures(
    source: Source, part: Part, root: Path, preprocessing: Preprocessing, kind: type[Pictures] = Pictures
) -> Pictures:
    spec = DataSpec(kind="imagefolder" if root.is_dir() else "csv", root=root)
    return kind(spec, source, {"test": part}, "test", preprocessing, False)


def _noted(note: str, source: Source) -> str:
    skipped = f"{len(source.skipped)} files are no usable pictures" if source.skipped else ""
    return "; ".join(each for each in (note, skipped) if each)


def _cells(root: Path) -> dict[tuple[str, int], Path]:
    """(corruption, severity) -> its directory of class folders; empty where the tree has another shape."""
    found: dict[tuple[str, int], Path] = {}
    for corruption in [*_directories(root), *(below for part in _directories(root) for below in _directories(part))]:
        inside = _directories(corruption)
        if inside and all(path.name in "12345" and len(path.name) == 1 for path in inside):
            found |= {(corruption.name, int(path.name)): path for path in inside if _directories(path)}
    return found


def _corrupted(
    name: str, root: Path, classes: Sequence[str], preprocessing: Preprocessing, count: int | None, seed: int
) -> ShiftSet:
    cells = _cells(root) if root.is_dir() else {}
    if not cells:
        raise ConfigError(f"{root}: no tree of CORRUPTION/SEVERITY/CLASS, as ImageNet-C is")
    corruptions = tuple(sorted({corruption for corruption, _ in cells}))
    severities = sorted({severity for _, severity in cells})
    for corruption in corruptions:
        if lacking := [severity for severity in severities if (corruption, severity) not in cells]:
            raise ConfigError(f"{root}: {corruption} lacks severity {lacking[0]}, which others have")
    folders = sorted({path.name for cell in cells.values() for path in _directories(cell)})
    index = dict(zip(folders, match(folders, classes, str(root)), strict=True))
    chosen: set[str] | None = None
    number: dict[str, int] = {}
    paths: list[Path] = []
    labels: list[int] = []
    places: list[tuple[int, int, int]] = []
    for (corruption, severity), cell in sorted(cells.items()):
        names = sorted(
            f"{folder.name}/{path.name}"
            for folder in _directories(cell)
            for path in folder.iterdir()
            if path.suffix.lower() in SUFFIXES
        )
        if chosen is None and count is not None:
            order = np.random.Generator(np.random.Philox(seed)).permutation(len(names))
            chosen = {names[i] for i in order[:count]}
        for each in names:
            if chosen is None or each in chosen:
                paths.append(cell / each)
                labels.append(int(index[each.partition("/")[0]]))
                places.append((corruptions.index(corruption), severity, number.setdefault(each, len(number))))
    if not paths:
        raise ConfigError(f"{root}: no usable picture in it")
    # decoding millions of files beforehand, as other sources do, would take as long as the evaluation
    part = Part(paths, np.array(labels, np.int64))
    as_is = preprocessing.model_copy(update={"resize": None})
    source = Source(f"pictures in {root.name}", list(classes), {"test": part})
    return ShiftSet(
        name,
        "imagenet-c",
        str(root),
        _pictures(source, part, root, as_is),
        np.arange(len(classes)),
        part.digest(root),
        "" if count is None else f"{count} pictures of each corruption and severity at most",
        corruptions,
        np.array(places, np.int64),
    )


def _objectnet(
    name: str, root: Path, source: Source, part: Part, classes: Sequence[str], preprocessing: Preprocessing,
    mapping: Path | None,
) -> ShiftSet:  # fmt: skip
    stands_for = _objectnet_mapping(root, source.classes, mapping)
    names, by_id = _index_by_name(classes), _index_by_wnid(tuple(classes))
    answers = np.full(len(classes), -1)
    right = np.full(len(source.classes), -1)
    number = unknown = 0
    for i, folder in enumerate(source.classes):
        wanted = stands_for.get(folder, [])
        found = {_one_class(each, classes, names, by_id) for each in wanted} - {-1}
        unknown += bool(wanted) and not found
        if not found:
            continue
        if taken := [k for k in sorted(found) if answers[k] >= 0]:
            raise ConfigError(f"{root}: two of its classes stand for {classes[taken[0]]!r}, the second is {folder!r}")
        answers[sorted(found)] = right[i] = number
        number += 1
    if number == 0:
        raise ConfigError(f"{root}: none of its {len(source.classes)} classes stands for one of the model's")
    rest = np.flatnonzero(answers < 0)
    answers[rest] = number + np.arange(len(rest))
    kept = np.flatnonzero(right[part.labels] >= 0)
    part = part.take(kept)
    part = Part(part.pictures, right[part.labels])
    note = f"{number} of its {len(source.classes)} classes stand for classes of the model, the others are left out"
    if unknown:
        note += f"; {unknown} of these are mapped, but to classes that the model lacks"
    pictures = _pictures(source, part, root, preprocessing, _Unframed)
    return ShiftSet(name, "objectnet", str(root), pictures, answers, part.digest(root), _noted(note, source))


def _objectnet_mapping(root: Path, folders: Sequence[str], given: Path | None) -> dict[str, list[str]]:
    """Folder -> the ImageNet classes that it stands for."""
    places = [given.parent] if given else [root / "mappings", root.parent / "mappings", root]
    labels: dict[str, Any] = {}
    for place in places:
        if (place / "folder_to_objectnet_label.json").is_file():
            labels = _json(place / "folder_to_objectnet_label.json")
    file = given or next(
        (path for place in places if (path := place / "objectnet_to_imagenet_1k.json").is_file()), None
    )
    if file is None:
        raise ConfigError(f"{root}: no mappings/objectnet_to_imagenet_1k.json beside it: name a mapping with --mapping")
    table = {_plain(str(key)): value for key, value in _json(file).items()}
    found: dict[str, list[str]] = {}
    for folder in folders:
        value = table.get(_plain(folder), table.get(_plain(str(labels.get(folder, "")))))
        if value is not None:
            parts = value if isinstance(value, list) else str(value).split(";")
            found[folder] = [str(part).strip() for part in parts]
    return found


def _one_class(text: str, classes: Sequence[str], names: Mapping[str, int], by_id: Mapping[str, int]) -> int:
    if text.isdecimal():
        return int(text) if int(text) < len(classes) else -1
    return names.get(_plain(text), by_id.get(text, -1))


def _json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"{path}: no valid JSON") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: a mapping is an object of names and classes")
    return document


def _directories(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").split()).casefold()


def _index_by_name(classes: Sequence[str]) -> dict[str, int]:
    """Whole names, and single synonyms ("goldfish" of "goldfish, Carassius auratus") that only one class has. Classes
    named by WordNet ids go by their descriptions too."""
    described = [_descriptions().get(name, "") for name in classes]
    whole = _unique((_plain(name), i) for names in (classes, described) for i, name in enumerate(names) if name)
    parts = _unique(
        (_plain(part), i)
        for names in (classes, described)
        for i, name in enumerate(names)
        for part in set(name.split(","))
        if part.strip()
    )
    return parts | whole


def _unique(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    owners: dict[str, set[int]] = {}
    for name, i in pairs:
        owners.setdefault(name, set()).add(i)
    return {name: next(iter(owner)) for name, owner in owners.items() if len(owner) == 1}


def _index_by_wnid(classes: tuple[str, ...]) -> dict[str, int]:
    """WordNet id -> index, for classes that are called as ImageNet-1k's are."""
    described = _descriptions()
    if list(classes) == list(described.values()):
        # in the usual order; two pairs of classes share a description, so names alone do not tell
        return {wnid: i for i, wnid in enumerate(described)}
    names = _index_by_name(classes)
    found: dict[str, int] = {}
    for wnid, description in described.items():
        candidates = [_plain(part) for part in (wnid, description, *description.split(","))]
        place = next((names[each] for each in candidates if each in names), None)
        if place is not None:
            found[wnid] = place
    return found


@lru_cache(maxsize=1)
def _descriptions() -> dict[str, str]:
    """WordNet id -> description of ImageNet-1k's classes in their usual order, from timm."""
    from timm.data.imagenet_info import ImageNetInfo

    info: Any = ImageNetInfo("imagenet-1k")
    return {info.index_to_label_name(i): info.index_to_description(i) for i in range(info.num_classes())}
