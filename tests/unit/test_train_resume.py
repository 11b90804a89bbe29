"""Whole runs on small real pictures: a killed and resumed run ends with the bits of an uninterrupted one."""

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from trivium.train.checkpoint import load_student
from trivium.train.loop import TrainingDiverged
from trivium.train.methods.teacher import Preflight, TeacherRefused, judge
from trivium.train.pipeline import train
from trivium.train.recipe import Recipe

NET = {"model": "trivium_resnet10_tiny"}
RECIPE = {
    "name": "digits",
    "seed": 1,
    "threads": 1,
    "data": {"kind": "digits", "limit": {"train": 256, "calibration": 64}},
    "input": {"height": 16, "width": 16, "resize": 16},
    "views": {"flip": False},
    "shifts": {"mixing_set": 20},
    "original": {**NET, "schedule": {"epochs": 3, "batch": 32, "lr": 0.005}},
    "teacher": {**NET, "schedule": {"epochs": 1, "batch": 32, "lr": 0.005}},
    "preflight": "warn",
    "heads": {"depth": 1},
    "student": {"schedule": {"epochs": 3, "batch": 32}, "uncertainty": "mutual_information"},
}


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def quiet() -> Console:
    return Console(file=io.StringIO())


def start(recipe: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "trivium", "train", str(recipe), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill_within(process: subprocess.Popen[str], sign: Path) -> None:
    """Kill -9 as soon as an epoch is on disk, that is, at the beginning of the next one."""
    deadline = time.monotonic() + 120
    while not sign.exists():
        assert process.poll() is None, f"ended before {sign}: {process.communicate()[0]}"
        assert time.monotonic() < deadline, f"{sign} never came"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_killed_and_resumed_is_bit_identical(tmp_path):
    straight = train(Recipe.model_validate(RECIPE), tmp_path / "straight", quiet())
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "killed"
    recipe.write_text(yaml.safe_dump(RECIPE))
    kill_within(start(recipe, out), out / "original" / "epoch-0001" / "state.json")
    kill_within(start(recipe, out), out / "student" / "epoch-0001" / "state.json")
    last = start(recipe, out)
    text, _ = last.communicate(timeout=120)
    assert last.returncode == 0, text
    assert "original: done before, skipped" in text
    assert "student: resumed after epoch" in text
    student, meta = load_student(out)
    assert meta.weights_sha256 == straight.weights_sha256
    assert meta.costs["original"].resumed >= 1
    assert meta.costs["original"].pictures == straight.costs["original"].pictures == 3 * 256
    assert meta.costs["student"].cpu_seconds > 0
    assert len(meta.classes) == 10
    wanted, got = (load_file(path / "student.safetensors") for path in (tmp_path / "straight", out))
    assert all(torch.equal(wanted[key], got[key]) for key in wanted)
    assert any(not torch.equal(got["heads.0.weight"], got[f"heads.{k}.weight"]) for k in (1, 2))
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint.json", "logs", "original", "student", "student.safetensors", "teacher",
    ]  # fmt: skip
    assert not student.training


def test_only_what_changed_is_trained_again(tmp_path):
    short = {**RECIPE, "original": {**NET, "schedule": {"epochs": 1, "batch": 64}}, "teacher": None}
    short["student"] = {"schedule": {"epochs": 1, "batch": 64}}
    first = train(Recipe.model_validate(short), tmp_path, quiet())
    assert "teacher" not in first.costs
    lines = io.StringIO()
    other = {**short, "student": {"schedule": {"epochs": 1, "batch": 64}, "alpha": 0.0}, "heads": {"depth": 0}}
    second = train(Recipe.model_validate(other), tmp_path, Console(file=lines))
    text = lines.getvalue()
    assert "original: done before, skipped" in text
    assert "student: the recipe or the data changed" in text
    assert second.costs["original"] == first.costs["original"]
    assert second.weights_sha256 != first.weights_sha256
    assert json.loads((tmp_path / "checkpoint.json").read_text())["recipe"]["student"]["alpha"] == 0.0

    lines = io.StringIO()
    elsewhere = tmp_path / "elsewhere"
    third = train(Recipe.model_validate(short), elsewhere, Console(file=lines, width=1000), [tmp_path / "no", tmp_path])
    assert f"original: done before in {tmp_path}, skipped" in lines.getvalue()
    assert "student: " in lines.getvalue()  # the run reused has another student by now
    assert third.weights_sha256 == first.weights_sha256
    train(Recipe.model_validate(short), elsewhere, Console(file=(lines := io.StringIO())))
    assert "original: done before, skipped" in lines.getvalue()


def test_a_loss_that_is_no_number_is_one_line_and_keeps_the_last_epoch(tmp_path):
    schedule = {"epochs": 3, "batch": 64, "optimizer": "sgd", "lr": 1e30, "warmup": 0.0}
    wild = {**RECIPE, "original": {**NET, "schedule": schedule}}
    with pytest.raises(TrainingDiverged, match=r"original: the loss is (nan|inf) in epoch") as caught:
        train(Recipe.model_validate(wild), tmp_path, quiet())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "checkpoint.json").exists()


def test_a_teacher_with_nothing_to_teach_is_refused_or_warned_of():
    weak = Preflight(pictures=10, original_clean=0.9, original_shifted=0.7, teacher_clean=0.9, teacher_shifted=0.7)
    with pytest.raises(TeacherRefused, match=r"70\.0%"):
        judge(weak, "refuse", print)
    said: list[str] = []
    judge(weak, "warn", said.append)
    assert said[0].startswith("WARNING")
    judge(weak.model_copy(update={"teacher_shifted": 0.8}), "refuse", said.append)
    assert said[1].startswith("preflight:")
