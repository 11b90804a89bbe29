"""Generated pictures on disk, written once, chunk by chunk: what was written outlives a kill and is not made again.

A chunk is a run of consecutive sample numbers. ROOT/pictures holds either class folders of PNG files, named so that
any ImageFolder reader gives them the labels they were made with, or one uint8 array a chunk, which is faster to read.
ROOT/records holds what is known of each chunk, as JSON; a chunk counts once its record is there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from trivium.runtime.errors import ConfigError, InvalidPicture

from .pictures import MEMORY
from .sources import open_file

Form = Literal["array", "png"]
STORE = "store.json"


class SampleStore:
    """Samples number 0 to N - 1 under a root; several processes may write chunks of their own at the same time.

    Args:
        names: of each sample's source, int64 [N]; sample j's file is named after names[j].
        labels: int64 [N].
        classes: in the order of the labels.
        fingerprint: of all that the samples are made from. Where the root holds samples of another one, `open` removes
            them.
    """

    def __init__(
        self, root: Path, form: Form, names: NDArray[np.int64], labels: NDArray[np.int64], classes: list[str],
        chunk: int, fingerprint: str,
    ) -> None:  # fmt: skip
        self.root, self.form, self.names, self.labels, self.chunk = root, form, names, labels, chunk
        self.fingerprint = fingerprint
        self.folders = class_folders(classes)
        self._loaded: dict[int, NDArray[np.uint8]] = {}

    def __len__(self) -> int:
        return len(self.names)

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-len(self) // self.chunk)

    def open(self) -> bool:
        """Make the root, empty unless it holds samples of this fingerprint; whether other samples were removed. Where
        several processes write, one of them opens before the others begin."""
        try:
            found = json.loads((self.root / STORE).read_text(encoding="utf-8"))["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError):
            found = None
        removed = found != self.fingerprint and (self.root / "records").exists()
        for part in ("records", "pictures"):
            if removed:
                shutil.rmtree(self.root / part, ignore_errors=True)
            (self.root / part).mkdir(parents=True, exist_ok=True)
        if self.form == "png":
            for folder in self.folders:
                (self.root / "pictures" / folder).mkdir(exist_ok=True)
        document = {"fingerprint": self.fingerprint, "form": self.form, "samples": len(self), "chunk": self.chunk}
        _write(self.root / STORE, json.dumps(document).encode())
        return removed

    def write(self, share: range, make: Callable[[NDArray[np.int64]], tuple[Tensor, dict[str, Any]]]) -> Iterator[int]:
        """Make the chunks of a share that are not there yet, and yield the number of each.

        make: sample numbers [n] -> (pictures uint8 [n, 3, H, W], the chunk's record). Of PNG files whose chunk a kill
        cut short, those that were written are kept, and only the others are asked for.
        """
        for index in share:
            if self._record(index).exists():
                continue
            numbers = np.arange(index * self.chunk, min((index + 1) * self.chunk, len(self)))
            if self.form == "png":
                numbers = np.array([n for n in numbers if not self._png(int(n)).exists()], np.int64)
            record: dict[str, Any] = {}
            if len(numbers):
                pictures, record = make(numbers)
                array = pictures.cpu().numpy()
                if self.form == "png":
                    for number, picture in zip(numbers, array, strict=True):
                        _write(self._png(int(number)), Image.fromarray(picture.transpose(1, 2, 0)))
                else:
                    _write(self._array(index), array)
            _write(self._record(index), json.dumps(record | {"samples": len(numbers)}).encode())
            yield index

    def records(self) -> list[dict[str, Any]]:
        """What was recorded of each chunk.

        Raises: ConfigError where a chunk is missing or unreadable.
        """
        paths = [self._record(index) for index in range(self.chunks)]
        try:
            return [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.root}: the record of a chunk is missing or unreadable ({error})") from None

    def batch(self, numbers: NDArray[np.int64]) -> Tensor:
        """Samples by number, uint8 [B, 3, H, W].

        Raises: ConfigError naming a file that cannot be read.
        """
        if self.form == "png":
            return torch.from_numpy(np.stack([self._picture(int(number)) for number in numbers]))
        chunks, places = np.divmod(numbers, self.chunk)
        return torch.from_numpy(
            np.stack([self._chunk(int(chunk))[place] for chunk, place in zip(chunks, places, strict=True)])
        )

    def _picture(self, number: int) -> NDArray[np.uint8]:
        if number not in self._loaded:
            path = self._png(number)
            try:
                picture = np.asarray(open_file(path)).transpose(2, 0, 1)
            except (OSError, InvalidPicture) as error:
                raise ConfigError(f"{path}: unreadable ({getattr(error, 'strerror', None) or error})") from None
            if len(self) * picture.size > MEMORY:
                return picture
            self._loaded[number] = picture
        return self._loaded[number]

    def _chunk(self, index: int) -> NDArray[np.uint8]:
        if index not in self._loaded:
            path = self._array(index)
            try:
                self._loaded[index] = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise ConfigError(f"{path}: unreadable ({getattr(error, 'strerror', None) or error})") from None
        return self._loaded[index]

    def _png(self, number: int) -> Path:
        return self.root / "pictures" / self.folders[self.labels[number]] / f"{self.names[number]:08d}.png"

    def _array(self, index: int) -> Path:
        return self.root / "pictures" / f"{index:06d}.npy"

    def _record(self, index: int) -> Path:
        return self.root / "records" / f"{index:06d}.json"


def class_folders(classes: list[str]) -> list[str]:
    """Folder names whose alphabetical order is that of the labels: the zero-padded label and what of the class's name
    a file name may hold."""
    width = len(str(len(classes) - 1))
    return [f"{i:0{width}d}-{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-').lower()}" for i, name in enumerate(classes)]


def _write(target: Path, content: bytes | Image.Image | NDArray[np.uint8]) -> None:
    """Write a file so that it is there whole or not at all."""
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    with scratch.open("wb") as file:
        if isinstance(content, Image.Image):
            content.save(file, "PNG")
        elif isinstance(content, bytes):
            file.write(content)
        else:
            np.save(file, content, allow_pickle=False)
    os.replace(scratch, target)
