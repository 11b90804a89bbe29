"""The HTTP/2 engine under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="c++ is not on the PATH")
def test_the_sanitizers_find_nothing() -> None:
    command = ["sh", str(Path(__file__).with_name("sanitize.sh")), "4000"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("headers ")
