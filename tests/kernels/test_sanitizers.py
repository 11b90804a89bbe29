"""The CPU kernels under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not on the PATH")
def test_the_sanitizers_find_nothing() -> None:
    result = subprocess.run(
        ["sh", str(ROOT / "tests" / "kernels" / "sanitize.sh")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert ", 0 failures" in result.stdout
    assert platform.machine() not in ("x86_64", "AMD64") or "on 0 instruction sets" not in result.stdout
