"""Where bundles come from: directories named one by one and a repository DIR/MODEL/VERSION; whether they changed."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from .bundle import MANIFEST
from .errors import ConfigError
from .repository import Served

MODEL_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
VERSION_FOLDER = re.compile(r"[1-9][0-9]{0,8}")
Print = tuple[tuple[str, int, int, int], ...]
"""Of each file its path, size, time of change and inode: enough to see that a directory is not what it was."""


@dataclass(eq=False)
class Source:
    """A directory that holds, or should hold, a bundle."""

    path: Path
    name: str = ""
    """The model's, from the folders of a repository or from the first manifest that was read."""
    version: str = ""
    """From the folders of a repository; empty where any will do."""
    seen: Print = ()
    """At the last look."""
    tried: Print = ()
    """What was loaded or refused last."""
    served: Served | None = None
    refusal: str = ""
    """Why what was tried last is not served."""
    gone: bool = False


@dataclass(eq=False)
class Group:
    """Sources of which the newest `keep` that load are served: one named bundle, or a repository's model."""

    keep: int
    sources: list[Source] = field(default_factory=list)
    unloaded: bool = False
    """By a call; until one asks to load it again, it is left alone."""

    @property
    def name(self) -> str:
        return self.sources[0].name

    def newest_first(self) -> list[Source]:
        return sorted(self.sources, key=lambda source: int(source.version or 0), reverse=True)


def look(path: Path) -> Print:
    """The state of a directory; () where there is none."""
    found: list[tuple[str, int, int, int]] = []
    for folder, _, names in os.walk(path):
        for name in names:
            file = os.path.join(folder, name)
            try:
                status = os.lstat(file)
            except OSError:
                continue
            found.append((os.path.relpath(file, path), status.st_size, status.st_mtime_ns, status.st_ino))
    return tuple(sorted(found))


def scan(repository: Path) -> dict[str, dict[str, Path]]:
    """Model -> version -> directory, of each DIR/MODEL/VERSION that has a manifest; what else lies there is ignored.

    Raises: ConfigError where the repository cannot be listed.
    """
    found: dict[str, dict[str, Path]] = {}
    try:
        for model in sorted(repository.iterdir()):
            if not (MODEL_FOLDER.fullmatch(model.name) and model.is_dir()):
                continue
            versions = {
                version.name: version
                for version in model.iterdir()
                if VERSION_FOLDER.fullmatch(version.name) and os.path.lexists(version / MANIFEST)
            }
            if versions:
                found[model.name] = versions
    except OSError as error:
        raise ConfigError(f"{repository}: cannot be listed: {error.strerror}") from None
    return found
