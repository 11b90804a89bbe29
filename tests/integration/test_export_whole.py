"""Whatever happens to an export, its target is as it was or whole: kills, full disks, quotas, read-only places."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TRIALS = Path(__file__).with_name("export_trials.py")
NEEDS_DISK = "no tmpfs can be mounted here (unshare -rm is not permitted)"


@pytest.fixture(scope="module")
def trials(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of all trials, in a process with mounts of its own where that is permitted."""
    namespace = ["unshare", "-rm"]
    if subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode:
        namespace = []
    command = [*namespace, sys.executable, str(TRIALS), str(checkpoint), str(tmp_path_factory.mktemp("trials"))]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_killed_export_leaves_the_target_absent_or_whole(trials: dict[str, Any]) -> None:
    assert len(trials["kills"]) == 10
    whole = trials["reference"]
    for kill in trials["kills"]:
        assert kill["state"] == whole or (kill["state"] is None and not kill["existed"]), kill
        assert kill["left"] <= 2, "an export clears what the last one to its target left, and there are two targets"
    assert trials["after kills"] == ["bundle0", "bundle1"]
    assert trials["after kills, states"] == [whole, whole]


def test_another_process_with_another_hash_seed_makes_the_same_bytes(
    trials: dict[str, Any], checkpoint: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "trivium", "export", str(checkpoint), str(tmp_path / "b"), "--no-calibrate"]
    done = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, check=False, env={**os.environ, "PYTHONHASHSEED": "8"}
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert {Path(file["path"]).name: file["sha256"] for file in document["artefacts"]} == trials["reference"]


@pytest.mark.parametrize(
    ("trial", "status", "reason"),
    [
        ("limited", 1, "File too large"),
        ("full", 1, "No space left on device"),
        ("read-only", 2, "is read-only"),
    ],
)
def test_a_place_that_does_not_take_it_is_one_line_and_nothing_left(
    trials: dict[str, Any], trial: str, status: int, reason: str
) -> None:
    found = trials[trial]
    if found is None:
        pytest.skip(NEEDS_DISK)
    assert (found["status"], found["left"]) == (status, False)
    assert reason in found["errors"]
    assert found["errors"].count("\n") == 1
