"""What the README shows works: its Python runs against a real server, its commands and targets exist."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from trivium.runtime.cli import COMMANDS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_run(
    code: str,
    build_bundle: Callable[..., Path],
    serve: Callable[..., Any],
    some_pictures: NDArray[np.uint8],
    tmp_path: Path,
) -> None:
    server = serve(build_bundle(tmp_path / "bundle", name="fashion-mnist"))
    Image.fromarray(some_pictures[0]).save(tmp_path / "picture.png")
    assert "127.0.0.1:8001" in code
    done = subprocess.run(
        [sys.executable, "-c", code.replace("127.0.0.1:8001", server.url)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "class " in done.stdout


def test_there_are_python_blocks() -> None:
    assert len(PYTHON) >= 2


def test_commands_exist_and_take_the_options_shown() -> None:
    lines = [line for language, text in BLOCKS if not language for line in text.splitlines()]
    shown = [line.split("#")[0].split() for line in lines if line.startswith("trivium ")]
    assert len(shown) >= 6
    for _, command, *words in shown:
        assert command in COMMANDS
        help_text = subprocess.run(
            [sys.executable, "-m", "trivium", command, "--help"], capture_output=True, text=True, check=True
        ).stdout
        for option in [word for word in words if word.startswith("--")]:
            assert option in help_text, f"trivium {command} has no {option}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", README, re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link
