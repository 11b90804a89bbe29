"""Labelled pictures for training, calibration and test: what to load, fixed splits, batches as serving sees them."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trivium.runtime.bundle import Preprocessing
from trivium.runtime.errors import ConfigError, InvalidPicture
from trivium.runtime.preprocess import prepare

from . import renditions
from .shards import huggingface_source, webdataset_source
from .sources import (
    SPLITS,
    Part,
    Source,
    Split,
    csv_source,
    digits_source,
    fashion_mnist_source,
    folder_source,
    open_file,
    renditions_source,
    split_parts,
    stratified_order,
    verified,
)

NAMED = ("fashion-mnist", "renditions", "digits")
"""Data that is found by its name, without a path."""
MEMORY = 512 << 20
"""Bytes of prepared pictures that a split may keep in memory; a larger one is decoded anew for every batch."""
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class Limits(BaseModel):
    """Most pictures to use of each split."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: Count | None = None
    calibration: Count | None = None
    test: Count | None = None


class DataSpec(BaseModel):
    """A data set and how it is split."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["fashion-mnist", "renditions", "imagefolder", "csv", "webdataset", "huggingface", "digits"]
    root: Path | None = None
    """Directory (imagefolder, fashion-mnist, renditions, huggingface), file (csv), pattern of tar files (webdataset) or
    name on the hub (huggingface); None: where `trivium data` puts it."""
    seed: int = 0
    """Of the splits and of the choice that a limit makes."""
    classes: Annotated[list[str], Field(min_length=2)] | None = None
    """Only the pictures of these, in this order; None takes all."""
    limit: Count | Limits | None = None
    """Most pictures of each split, drawn class by class."""
    calibration: Count | Share = 0.1
    """Count or share held out of the training part where the source has no val."""
    test: Count | Share = 0.2
    """Count or share held out of the training part where the source has no test."""
    strict: bool = False
    """Refuse a source with unreadable files instead of skipping them."""
    crop_scale: tuple[Share | Literal[1], Annotated[float, Field(gt=0, le=1)]] = (0.35, 1.0)
    """Least and largest share of the picture's area in a random resized crop (train_transform)."""
    flip: bool = True
    """Mirror half of the pictures (train_transform)."""

    @model_validator(mode="after")
    def _root_fits_kind(self) -> DataSpec:
        if self.kind in ("imagefolder", "csv", "webdataset", "huggingface") and self.root is None:
            raise ValueError(f"root: {self.kind} needs the path of the data")
        if self.kind == "digits" and self.root is not None:
            raise ValueError("root: the digits come with scikit-learn")
        if self.crop_scale[0] > self.crop_scale[1]:
            raise ValueError("crop_scale: the least share exceeds the largest")
        return self

    def limit_of(self, split: Split) -> int | None:
        return getattr(self.limit, split) if isinstance(self.limit, Limits) else self.limit


class Pictures:
    """One split of a data set; made by load_pictures.

    `classes`: names in the order of the labels. `labels`: int64 [N]. `skipped`: (path, reason) of the source's files
    that are no usable pictures.
    """

    def __init__(
        self, spec: DataSpec, source: Source, parts: dict[Split, Part], split: Split, preprocessing: Preprocessing,
        train_transform: bool,
    ) -> None:  # fmt: skip
        self.spec, self.split, self.preprocessing = spec, split, preprocessing
        self.classes = source.classes
        self.skipped = source.skipped
        self.labels = parts[split].labels
        self._source, self._parts, self._train_transform = source, parts, train_transform
        self._pictures = parts[split].pictures
        height, width = preprocessing.height, preprocessing.width
        self._as_is = not isinstance(self._pictures, list) and self._pictures.shape[1:3] == (height, width)
        keep = not self._as_is and not train_transform and len(self) * height * width * 3 <= MEMORY
        self._kept: NDArray[np.uint8] | None = np.empty((len(self), height, width, 3), np.uint8) if keep else None
        self._have = np.zeros(len(self), bool)
        self._pool: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def files(self) -> list[Path] | None:
        """The files of the pictures, in their order; None where the source is no files."""
        if not isinstance(self._pictures, list):
            return None
        files = [each for each in self._pictures if isinstance(each, Path)]
        return files if len(files) == len(self) else None

    @property
    def root(self) -> Path | None:
        """The directory that the source is read from, where it is one."""
        return _base(self.spec)

    def batch(
        self, indices: Sequence[int] | NDArray[np.int64] | torch.Tensor, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """The pictures as uint8 [B, 3, H, W], prepared as the runtime prepares them; with train_transform a random
        resized crop and flip of each, drawn from the generator.

        Raises: InvalidPicture naming a file that can no longer be read.
        """
        chosen = np.asarray(indices, np.int64)
        if self._train_transform:
            if generator is None:
                raise ValueError("train_transform draws crops: give batch() a generator")
            draws = torch.rand((len(chosen), 5), generator=generator, dtype=torch.float64).tolist()
            stack = self._map(self._random_crop, chosen.tolist(), draws)
        elif self._as_is:
            assert not isinstance(self._pictures, list)
            stack = self._pictures[chosen]
        elif self._kept is not None:
            missing = np.unique(chosen[~self._have[chosen]])
            if missing.size:
                self._kept[missing] = self._map(self._prepared, missing.tolist())
                self._have[missing] = True
            stack = self._kept[chosen]
        else:
            stack = self._map(self._prepared, chosen.tolist())
        tensor = torch.from_numpy(np.ascontiguousarray(stack))
        if tensor.ndim == 3:
            return tensor[:, None].expand(-1, 3, -1, -1).contiguous()
        return tensor.permute(0, 3, 1, 2).contiguous()

    def describe(self) -> dict[str, Any]:
        """What a checkpoint records: the spec, the source, counts and classes, and a SHA-256 over every split's labels
        and contents (files: relative paths and sizes). load_described opens the same splits again."""
        root = _base(self.spec)
        digests = "".join(self._parts[split].digest(root) for split in SPLITS)
        document = self.spec.model_dump(mode="json")
        if self.spec.root is not None and not (self.spec.kind == "huggingface" and not self.spec.root.exists()):
            document["root"] = str(self.spec.root.absolute())
        return {
            "spec": document,
            "source": self._source.name,
            "classes": self.classes,
            "counts": {split: len(self._parts[split].labels) for split in SPLITS},
            "skipped": len(self.skipped),
            "split_seed": self.spec.seed,
            "digest": hashlib.sha256("\n".join([*self.classes, digests]).encode()).hexdigest(),
        }

    def _map(self, function: Any, *arguments: list[Any]) -> NDArray[np.uint8]:
        if not isinstance(self._pictures, list):
            return np.stack([function(*each) for each in zip(*arguments, strict=True)])
        if self._pool is None:
            self._pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="decode")
        return np.stack(list(self._pool.map(function, *arguments)))

    def _open(self, index: int) -> Image.Image:
        if not isinstance(self._pictures, list):
            return Image.fromarray(self._pictures[index]).convert("RGB")
        path = self._pictures[index]
        try:
            return open_file(path)
        except OSError as error:
            raise InvalidPicture(f"{path}: {error.strerror}") from None
        except InvalidPicture as error:
            raise InvalidPicture(f"{path}: {error}") from None

    def _prepared(self, index: int) -> NDArray[np.uint8]:
        return prepare(self._open(index), self.preprocessing)

    def _random_crop(self, index: int, draw: list[float]) -> NDArray[np.uint8]:
        picture = self._open(index)
        box = crop_box(picture.width, picture.height, self.spec.crop_scale, draw)
        size = (self.preprocessing.width, self.preprocessing.height)
        crop = picture.resize(size, RESAMPLING[self.preprocessing.interpolation], box=box)
        array = np.asarray(crop)
        return array[:, ::-1] if self.spec.flip and draw[4] < 0.5 else array


def crop_box(
    width: int, height: int, scale: tuple[float, float], draw: Sequence[float]
) -> tuple[float, float, float, float]:
    """A random crop (left, upper, right, lower) of scale[0] to scale[1] of the area and an aspect ratio of 3/4 to 4/3
    times the picture's (Szegedy et al. 2015), made from uniform draws: area, ratio, x, y."""
    area = scale[0] + (scale[1] - scale[0]) * draw[0]
    ratio = math.exp((2 * draw[1] - 1) * math.log(4 / 3))
    w, h = min(math.sqrt(area * ratio), 1.0), min(math.sqrt(area / ratio), 1.0)
    left, upper = (1 - w) * draw[2], (1 - h) * draw[3]
    return left * width, upper * height, (left + w) * width, (upper + h) * height


def load_pictures(
    spec: DataSpec, split: Split, preprocessing: Preprocessing, *, train_transform: bool = False
) -> Pictures:
    """Open one split of a data set. The splits depend on the spec and the data alone.

    Raises: ConfigError in one line where the data cannot be used, or (strict) a file is unreadable.
    """
    source, parts = open_splits(spec)
    return Pictures(spec, source, parts, split, preprocessing, train_transform)


def open_splits(spec: DataSpec) -> tuple[Source, dict[Split, Part]]:
    """The source of a spec and its three splits, limits applied.

    Raises: ConfigError, as load_pictures.
    """
    source = open_source(spec)
    if spec.classes is not None:
        source = source.only(spec.classes)
    parts = split_parts(source.parts, spec.seed, spec.calibration, spec.test, _base(spec))
    for split in SPLITS:
        limit = spec.limit_of(split)
        if limit is not None and limit < len(parts[split].labels):
            order = stratified_order(parts[split].labels, spec.seed)
            parts[split] = parts[split].take(np.sort(order[:limit]))
    return source, parts


def load_described(
    description: dict[str, Any], split: Split, preprocessing: Preprocessing, *, root: Path | None = None
) -> Pictures:
    """Open again what a checkpoint describes (Pictures.describe); root: where the data lies now, if it moved.

    Raises: ConfigError where the data is gone or is not what it was.
    """
    try:
        spec = DataSpec.model_validate(description["spec"])
        expected = description["digest"]
    except (KeyError, TypeError, ValidationError):
        raise ConfigError("the checkpoint's description of its data cannot be read") from None
    if root is not None:
        spec = spec.model_copy(update={"root": root})
    pictures = load_pictures(spec, split, preprocessing)
    if pictures.describe()["digest"] != expected:
        where = f" in {spec.root}" if spec.root else ""
        raise ConfigError(f"the data{where} ({spec.kind}) is not what the checkpoint was trained on: digests differ")
    return pictures


def load_same(description: dict[str, Any], data: str, split: Split, preprocessing: Preprocessing) -> Pictures | None:
    """One split of what a checkpoint describes, where `data`, as parse_spec reads it, is that very data, so that its
    splits are those of the training; None where it is other data."""
    spec = parse_spec(data)
    if spec.kind != description["spec"].get("kind"):
        return None
    try:
        return load_described(description, split, preprocessing, root=spec.root)
    except ConfigError:
        return None


def load_whole(spec: DataSpec, preprocessing: Preprocessing) -> Pictures:
    """All pictures of a data set as one split, which is called test.

    Raises: ConfigError, as load_pictures.
    """
    source, parts = open_splits(spec)
    labels = np.concatenate([part.labels for part in parts.values()])
    if any(isinstance(part.pictures, list) for part in parts.values()):
        whole = Part([each for part in parts.values() for each in part.pictures], labels)
    else:
        whole = Part(np.concatenate([part.pictures for part in parts.values()]), labels)
    return Pictures(spec, source, parts | {"test": whole}, "test", preprocessing, False)


def open_source(spec: DataSpec) -> Source:
    """The source of a spec, its files verified.

    Raises: ConfigError.
    """
    if spec.kind == "fashion-mnist":
        return fashion_mnist_source(spec.root)
    if spec.kind == "digits":
        return digits_source()
    source = verified(_listed(spec))
    if spec.strict and source.skipped:
        first, more = source.skipped[0], len(source.skipped) - 1
        others = f" (and {more} more)" if more else ""
        raise ConfigError(f"{first.path}: {first.reason}{others}; strict refuses unreadable files")
    return source


def _listed(spec: DataSpec) -> Source:
    if spec.kind == "renditions":
        return renditions_source(spec.root)
    assert spec.root is not None, "the spec's validator asks for it"
    read = {
        "imagefolder": folder_source,
        "csv": csv_source,
        "webdataset": webdataset_source,
        "huggingface": huggingface_source,
    }
    return read[spec.kind](spec.root)


def parse_spec(text: str, **settings: Any) -> DataSpec:
    """A spec from what a user types: a data set's name, a directory of class folders or of a Hugging Face dataset, a
    .csv manifest, or a pattern of .tar shards.

    Raises: ConfigError.
    """
    path = Path(text)
    if text in NAMED:
        return DataSpec(kind=text, **settings)  # type: ignore[arg-type]
    if path.suffix.lower() == ".tar":
        return DataSpec(kind="webdataset", root=path, **settings)
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return DataSpec(kind="huggingface", root=path, **settings)
    if path.is_dir():
        return DataSpec(kind="imagefolder", root=path, **settings)
    if path.suffix.lower() == ".csv":
        return DataSpec(kind="csv", root=path, **settings)
    raise ConfigError(f"{text}: neither fashion-mnist, renditions, digits, a directory, a .csv file, nor .tar shards")


def _base(spec: DataSpec) -> Path | None:
    """The directory against which file names are relative."""
    if spec.kind == "renditions":
        return spec.root or renditions.default_directory()
    return spec.root.parent if spec.root is not None and spec.kind == "csv" else spec.root
