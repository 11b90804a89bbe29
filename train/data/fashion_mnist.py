"""Fashion-MNIST: where its four IDX files may lie, reading and checking them, and obtaining them without root."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trivium.runtime.errors import ConfigError

CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
DEBIAN_DIRECTORY = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the files."""
DEBIAN_PACKAGE = "dataset-fashion-mnist"
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""Of the uncompressed files: the packagers' gzip differs, the content does not."""
APT_SECONDS = 600


class IdxSet(NamedTuple):
    """The two parts of the data set: pictures uint8 [N, h, w], labels int64 [N]."""

    train_pictures: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_pictures: NDArray[np.uint8]
    test_labels: NDArray[np.int64]


def cache_directory() -> Path:
    """$TRIVIUM_CACHE, or trivium in the user's cache directory."""
    if given := os.environ.get("TRIVIUM_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trivium"


def locate(root: Path | None = None) -> Path | None:
    """The first directory that holds all four files: root (or its FashionMNIST/raw) alone if given, else the cache
    and the directory of Debian's package. None where there is none."""
    places = [root] if root is not None else [cache_directory() / "fashion-mnist", DEBIAN_DIRECTORY]
    for place in places:
        for directory in (place, place / "FashionMNIST" / "raw"):
            if all(_file(directory, name) for name in SHA256):
                return directory
    return None


def read(directory: Path, *, check_digests: bool = False) -> IdxSet:
    """Read the four files, plain or gzip-compressed.

    Raises: ConfigError naming the file where it is absent, no IDX file, of the wrong length, or (check_digests) not
    the published content.
    """
    contents = {name: _content(directory, name) for name in SHA256}
    if check_digests:
        for name, content in contents.items():
            if hashlib.sha256(content).hexdigest() != SHA256[name]:
                raise ConfigError(f"{directory / name}: its content is not the published Fashion-MNIST's")
    arrays = {name: parse_idx(content, str(directory / name)) for name, content in contents.items()}
    for part in ("train", "t10k"):
        pictures, labels = arrays[f"{part}-images-idx3-ubyte"], arrays[f"{part}-labels-idx1-ubyte"]
        if pictures.ndim != 3 or labels.ndim != 1 or len(pictures) != len(labels) or len(labels) == 0:
            raise ConfigError(f"{directory}: the {part} pictures {pictures.shape} and labels {labels.shape} disagree")
        if labels.max() >= len(CLASSES):
            raise ConfigError(f"{directory}: label {labels.max()} in the {part} part, there are {len(CLASSES)} classes")
    return IdxSet(
        arrays["train-images-idx3-ubyte"],
        arrays["train-labels-idx1-ubyte"].astype(np.int64),
        arrays["t10k-images-idx3-ubyte"],
        arrays["t10k-labels-idx1-ubyte"].astype(np.int64),
    )


def parse_idx(content: bytes, name: str) -> NDArray[np.uint8]:
    """An IDX file of unsigned bytes: two zeros, type 8, rank, big-endian sizes, data.

    Raises: ConfigError.
    """
    rank = content[3] if len(content) > 4 and content[:3] == b"\0\0\x08" else 0
    if not 1 <= rank <= 4 or len(content) < 4 + 4 * rank:
        raise ConfigError(f"{name}: not an IDX file of unsigned bytes")
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", rank, 4))
    expected = 4 + 4 * rank + int(np.prod(shape, dtype=object))
    if len(content) != expected:
        raise ConfigError(f"{name}: {len(content)} bytes, its header promises {expected}")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def obtain(out: Path | None = None, say: Callable[[str], None] = print) -> Path:
    """The directory of a checked Fashion-MNIST: one that is there already, else Debian's package, else torchvision's
    download; written to out or the cache directory.

    Raises: ConfigError with what each way answered.
    """
    if found := locate(out):
        read(found, check_digests=True)
        say(f"Fashion-MNIST is there already: {found}")
        return found
    target = out or cache_directory() / "fashion-mnist"
    reasons = []
    for fetch in (_from_debian, _from_torchvision):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fashion-mnist-") as scratch:
                source, origin = fetch(Path(scratch), say)
                read(source, check_digests=True)
                target.mkdir(exist_ok=True)
                for name in SHA256:
                    file = _file(source, name)
                    assert file is not None, "read() found it"
                    shutil.copyfile(file, Path(scratch) / "whole")
                    (Path(scratch) / "whole").replace(target / file.name)
        except (ConfigError, OSError) as error:
            reasons.append(str(error))
            continue
        say(f"Fashion-MNIST ({origin}) written to {target}")
        return target
    raise ConfigError("Fashion-MNIST could not be obtained: " + "; ".join(reasons))


def _from_debian(scratch: Path, say: Callable[[str], None]) -> tuple[Path, str]:
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise ConfigError("Debian package: no apt-get and dpkg-deb here")
    say(f"fetching Debian's package {DEBIAN_PACKAGE} (31 MB)")
    timeouts = ["-o", "Acquire::http::Timeout=30", "-o", "Acquire::Retries=2", "-o", "APT::Sandbox::User="]
    # Package lists of our own, because without root the system's cannot be refreshed.
    for name in ("lists/partial", "cache/archives/partial"):
        (scratch / name).mkdir(parents=True)
    own = ["-o", f"Dir::State::Lists={scratch / 'lists'}", "-o", f"Dir::Cache={scratch / 'cache'}"]
    attempts = [
        [["apt-get", *timeouts, "download", DEBIAN_PACKAGE]],
        [["apt-get", *timeouts, *own, "update"], ["apt-get", *timeouts, *own, "download", DEBIAN_PACKAGE]],
    ]
    answer = ""
    for commands in attempts:
        for command in commands:
            answer = _run(command, scratch)
        if packages := sorted(scratch.glob(f"{DEBIAN_PACKAGE}_*.deb")):
            answer = _run(["dpkg-deb", "-x", str(packages[0]), str(scratch / "unpacked")], scratch)
            directory = scratch / "unpacked" / DEBIAN_DIRECTORY.relative_to("/")
            if locate(directory):
                return directory, f"Debian package {packages[0].stem}"
            break
    raise ConfigError(f"Debian package: {answer or 'it holds no IDX files'}")


def _run(command: list[str], directory: Path) -> str:
    """The last line of what a failing command said, or nothing."""
    try:
        done = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, timeout=APT_SECONDS, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {type(error).__name__}"
    lines = [line for line in done.stderr.splitlines() if line.startswith("E:")] or done.stderr.splitlines()
    return f"{command[0]}: {lines[-1].removeprefix('E: ')}" if done.returncode and lines else ""


def _from_torchvision(scratch: Path, say: Callable[[str], None]) -> tuple[Path, str]:
    from torchvision.datasets import FashionMNIST

    say("fetching Fashion-MNIST with torchvision (30 MB)")
    try:
        FashionMNIST(scratch, download=True)
    except (RuntimeError, OSError) as error:
        raise ConfigError(
            f"torchvision: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from None
    return scratch / "FashionMNIST" / "raw", "torchvision's download"


def _file(directory: Path, name: str) -> Path | None:
    return next((path for path in (directory / name, directory / f"{name}.gz") if path.is_file()), None)


def _content(directory: Path, name: str) -> bytes:
    path = _file(directory, name)
    if path is None:
        raise ConfigError(f"{directory}: no {name} in it")
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
