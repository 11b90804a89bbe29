"""A directory that takes its name only when it is whole: all of it in a sibling first, then one rename."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .bundle import MANIFEST
from .errors import ConfigError, ServerError

STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}
"""What a file system may answer to a write."""
NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.EOPNOTSUPP}
AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Of renameat2(2)."""


class StorageError(ServerError):
    """The disk is full, over its quota, or fails; nothing of what was to be written is left on it."""


@contextlib.contextmanager
def staging(target: Path, force: bool = False, holds: str = MANIFEST) -> Iterator[Path]:
    """A directory beside target that takes target's place when the block ends well, and vanishes when it does not.

    A kill at any moment leaves the target as it was, or new and whole; what it leaves beside the target is removed by
    the next staging of the same target. Where the file system can exchange two names, an old target is never missing.

    Args:
        force: replace what is there, if it has a file that matches the glob `holds`.

    Raises: ConfigError where target exists and force is off, where force would remove something else, or where the
        place cannot be written; StorageError where the disk fails the block.
    """
    refuse_existing(target, force, holds)
    made = list(missing_folders(target.parent))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        work, lock = claim(target)
    except OSError as error:
        remove_empty(made)
        raise ConfigError(f"{target}: cannot be written ({error.strerror})") from None
    try:
        build = work / "new"
        build.mkdir()
        yield build
        flush(build)
        put(build, target, work / "old")
        made = []
    except OSError as error:
        if error.errno not in STORAGE:
            raise
        raise StorageError(f"{target}: cannot be written ({error.strerror}); nothing of it was kept") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)
        remove_empty(made)


def refuse_existing(target: Path, force: bool, holds: str = MANIFEST) -> None:
    """Raise ConfigError where target may not be written, as far as can be known without writing."""
    try:
        free = not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir()))
        replaceable = not target.is_symlink() and any(path.is_file() for path in target.glob(holds))
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written ({error.strerror})") from None
    if not free:
        if not force:
            raise ConfigError(f"{target} exists; --force replaces it")
        if not replaceable:
            kind = "bundle" if holds == MANIFEST else "model repository"
            raise ConfigError(f"{target} is no {kind}, so --force does not remove it")
    folder = next(path for path in target.absolute().parents if os.path.lexists(path))
    if not os.access(folder, os.W_OK | os.X_OK) or not folder.is_dir():
        reason = "read-only" if folder.is_dir() else "no directory"
        raise ConfigError(f"{target}: cannot be written ({folder} is {reason})")


def missing_folders(folder: Path) -> Iterator[Path]:
    """The folder and those above it that do not exist, innermost first."""
    for path in (folder, *folder.parents):
        if os.path.lexists(path):
            return
        yield path


def remove_empty(folders: list[Path]) -> None:
    """Remove folders that were made for nothing, innermost first, as far as they are empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def claim(target: Path) -> tuple[Path, int]:
    """A working directory beside target and the descriptor that locks it; the kernel unlocks that of a dead process."""
    while True:
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.trivium-", dir=target.parent))
        lock = locked(work)
        # between the two calls another process may have swept it away
        if lock is not None and work.is_dir():
            return work, lock
        if lock is not None:
            os.close(lock)


def sweep(target: Path) -> None:
    """Remove the working directories for this target of processes that were killed."""
    ours = re.compile(re.escape(f".{target.name}.trivium-") + r"[a-z0-9_]{8}")
    for work in [path for path in target.parent.iterdir() if ours.fullmatch(path.name)]:
        lock = locked(work)
        if lock is None:
            continue
        if (work / "old").is_dir() and not os.path.lexists(target):
            os.rename(work / "old", target)
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def locked(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock, or None where another process does or the folder is gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def flush(folder: Path) -> None:
    """Have the disk hold every file below folder before any name leads to it."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def put(build: Path, target: Path, old: Path) -> None:
    """Give the finished directory its name; what had it before ends where build was, or as old."""
    if not os.path.lexists(target):
        os.rename(build, target)
        return
    try:
        exchange(build, target)
    except OSError as error:
        if error.errno not in NO_EXCHANGE:
            raise
        os.rename(target, old)
        os.rename(build, target)


def exchange(one: Path, other: Path) -> None:
    """Swap two names in one step, so that neither is ever missing (Linux, on most local file systems).

    Raises: OSError.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one))
