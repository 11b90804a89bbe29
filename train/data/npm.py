"""npm packages as data: found in a directory that the user gives, or fetched with `npm pack`; read, never run."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trivium.runtime.errors import ConfigError

SECONDS = 600
"""Longest that one `npm pack` may take."""


@dataclass(frozen=True)
class Package:
    """One package, unpacked (a directory) or packed (a .tgz)."""

    path: Path
    name: str
    version: str
    _read: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def document(self, file: str) -> Any:
        """The contents of one of its JSON files; None where it has no such file.

        Raises: ConfigError where the package or the file cannot be read.
        """
        if file not in self._read:
            self._read[file] = _read(self.path, file)
        return self._read[file]


def packages_in(directory: Path) -> dict[str, Package]:
    """Packages by name among the tarballs and folders of a directory, and one level below it (node_modules/@scope).

    Raises: ConfigError where there is no such directory, or one package twice in different versions.
    """
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such directory")
    found: dict[str, Package] = {}
    for path in sorted([directory, *directory.glob("*"), *directory.glob("*/*")]):
        if not ((path / "package.json").is_file() or (path.suffix == ".tgz" and path.is_file())):
            continue
        about = _read(path, "package.json")
        if not isinstance(about, dict) or not all(isinstance(about.get(key), str) for key in ("name", "version")):
            raise ConfigError(f"{path}: no npm package (its package.json names no name and version)")
        package = Package(path, about["name"], about["version"])
        other = found.setdefault(package.name, package)
        if other.version != package.version:
            raise ConfigError(
                f"{directory}: {package.name} twice, {other.version} in {other.path.name} and {package.version} in "
                f"{path.name}"
            )
    return found


def fetch(wanted: Mapping[str, str], store: Path, say: Callable[[str], None] = print) -> dict[str, Package]:
    """The wanted packages, name -> version, from the registry that npm is set to, kept as tarballs in `store`; those
    that are there already are not fetched again.

    Raises: ConfigError where npm is absent or a package cannot be had.
    """
    paths = {name: store / f"{name.removeprefix('@').replace('/', '-')}-{wanted[name]}.tgz" for name in wanted}
    missing = [name for name, path in paths.items() if not path.is_file()]
    if missing and shutil.which("npm") is None:
        raise ConfigError(
            f"fetching {missing[0]} needs npm, which is not on PATH: install Node.js, or give a directory with the "
            "packages (--from)"
        )
    for number, name in enumerate(missing, start=1):
        say(f"npm pack {name}@{wanted[name]} ({number} of {len(missing)})")
        try:
            store.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=store, prefix=".") as scratch:
                _pack(f"{name}@{wanted[name]}", Path(scratch)).replace(paths[name])
        except OSError as error:
            raise ConfigError(f"{store}: cannot be written ({error.strerror})") from None
    found = {}
    for name, path in paths.items():
        about = _read(path, "package.json")
        if not isinstance(about, dict) or about.get("name") != name or about.get("version") != wanted[name]:
            raise ConfigError(f"{path}: not {name} {wanted[name]}; delete it to have it fetched again")
        found[name] = Package(path, name, wanted[name])
    return found


def _pack(spec: str, scratch: Path) -> Path:
    try:
        done = subprocess.run(
            ["npm", "pack", spec], cwd=scratch, capture_output=True, text=True, timeout=SECONDS,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ConfigError(f"npm pack {spec}: no answer within {SECONDS} s") from None
    tarballs = list(scratch.glob("*.tgz"))
    if done.returncode or len(tarballs) != 1:
        said = [line.removeprefix("npm error ") for line in done.stderr.splitlines() if line.startswith("npm error ")]
        # Short lines are codes; the first long one says what happened.
        reason = next((line for line in said if len(line.split()) > 3), f"exit status {done.returncode}")
        raise ConfigError(f"npm pack {spec}: {reason.removeprefix('notarget ')}")
    return tarballs[0]


def _read(path: Path, file: str) -> Any:
    try:
        if path.is_dir():
            content = (path / file).read_bytes() if (path / file).is_file() else None
        else:
            content = _member(path, file)
        return None if content is None else json.loads(content)
    except (OSError, EOFError, zlib.error, tarfile.TarError, ValueError) as error:
        raise ConfigError(f"{path}: {file} cannot be read ({' '.join(str(error).split())[:120]})") from None


def _member(path: Path, file: str) -> bytes | None:
    # Streaming stops at the file; the member list would read a tarball of pictures to its end.
    with tarfile.open(path, "r|gz") as archive:
        for member in archive:
            # npm's own tarballs have everything in package/, others in a directory of some name.
            if member.isfile() and member.name.partition("/")[2] == file:
                stream = archive.extractfile(member)
                return None if stream is None else stream.read()
    return None
