"""`trivium predict` and `trivium bundle` as a user runs them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from trivium.runtime.bundle import Manifest
from trivium.runtime.predictor import Predictor
from trivium.runtime.promises import terms

pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'trivium[cpu]'")


def trivium(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trivium", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, some_pictures: NDArray[np.uint8]) -> Path:
    """Three pictures, one of them in a folder below, and a text file."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "below").mkdir()
    for i, name in enumerate(["a.png", "b.PNG", "below/c.webp"]):
        Image.fromarray(some_pictures[i]).save(root / name, lossless=True)
    (root / "notes.txt").write_text("no picture")
    return root


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"\xff\xd8\xff\xe0 nonsense")
    return path


def test_json_holds_the_predictors_answers(tiny_bundle: Path, folder: Path, some_pictures: NDArray[np.uint8]) -> None:
    done = trivium("predict", tiny_bundle, folder, "--json", "--top", "3", "--router", "paper")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(row["path"]).name for row in rows] == ["a.png", "b.PNG", "c.webp"]
    predictor = Predictor.load(tiny_bundle)
    for row, image in zip(rows, some_pictures, strict=False):
        answer = predictor.infer(image, "paper")
        assert (row["label"], row["class_id"], row["head"]) == (answer.label, answer.class_id, answer.head)
        assert row["probability"] == answer.probabilities.max()
        order = np.argsort(-answer.probabilities)[:3]
        assert [entry["class_id"] for entry in row["top"]] == order.tolist()
        assert list(row["predictive_entropy"].values()) == answer.predictive_entropy.tolist()
        assert list(row["mutual_information"].values()) == answer.mutual_information.tolist()
        assert row["divergence"]["robust"]["clean"] == answer.divergence[1, 0]
        assert row["decode_ns"] > 0


def test_what_a_bundle_promises_is_shown(
    guaranteed_bundle: Path, folder: Path, some_pictures: NDArray[np.uint8]
) -> None:
    asked = ("--router", "robust", "--coverage", "0.93", "--max-risk", "0.25")
    done = trivium("predict", guaranteed_bundle, folder, "--json", *asked)
    assert (done.returncode, done.stderr) == (0, "")
    predictor = Predictor.load(guaranteed_bundle)
    levels = terms(predictor.manifest, "robust", 0.95, 0.2)
    sizes = set()
    for line, image in zip(done.stdout.splitlines(), some_pictures, strict=False):
        row, answer = json.loads(line), predictor.infer(image, "robust", levels)
        assert answer.prediction_set is not None
        ranked = [i for i in (-answer.probabilities).argsort(kind="stable").tolist() if answer.prediction_set[i]]
        assert row["prediction_set"] == [f"class {i}" for i in ranked]
        assert (row["abstain"], row["shift_score"]) == (answer.abstain, answer.shift_score)
        sizes.add(len(ranked))
    assert len(sizes) > 1
    lines = trivium("predict", guaranteed_bundle, folder, *asked).stdout.splitlines()
    assert lines[1].split()[-2:] == ["set", "shift"]
    assert [line.split()[-1] for line in lines[2:5]] == [
        f"{predictor.infer(image, 'robust').shift_score:.3f}" for image in some_pictures[:3]
    ]
    assert any("abstains" in line for line in lines)


def test_levels_out_of_range_or_without_guarantees_are_refused(
    guaranteed_bundle: Path, tiny_bundle: Path, folder: Path
) -> None:
    done = trivium("predict", guaranteed_bundle, folder / "a.png", "--max-risk", "0.01")
    words = "parameter 'max_risk' must be from 0.05 to 0.3 for router 'blend', got 0.01"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"trivium predict: {words}\n")
    done = trivium("predict", tiny_bundle, folder / "a.png", "--coverage", "0.9")
    assert done.returncode == 2
    assert done.stderr == (
        "trivium predict: parameter 'coverage' cannot be used for model 'tiny'; "
        "its bundle has no guarantees; run: trivium calibrate BUNDLE\n"
    )


def test_json_is_json_whatever_the_paths_and_the_output_hold(
    tiny_bundle: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff \xc3\xa9.png")
    shutil.copy(folder / "a.png", odd)
    for encoding in ("ascii", "utf-8"):
        monkeypatch.setenv("PYTHONIOENCODING", encoding)
        done = trivium("predict", tiny_bundle, odd, "--json")
        assert done.returncode == 0
        assert json.loads(done.stdout)["path"] == odd


def test_the_table_names_every_picture(tiny_bundle: Path, folder: Path) -> None:
    done = trivium("predict", tiny_bundle, folder / "a.png", folder / "below", "--kernels", "off", "--top", "2")
    assert done.returncode == 0
    for text in ("a.png", "c.webp", "entropy", "KL clean-robust", "class "):
        assert text in done.stdout


def test_the_table_leaves_out_the_folder_that_all_share(
    tiny_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = trivium("predict", tiny_bundle, folder).stdout.splitlines()
    assert lines[0] == f"in {folder}"
    assert [line.split()[0] for line in lines[2:5]] == ["a.png", "b.PNG", "below/c.webp"]
    monkeypatch.chdir(folder)
    lines = trivium("predict", tiny_bundle, "a.png", folder / "b.PNG").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["a.png", str(folder / "b.PNG")]


def test_a_single_head_has_no_divergence_to_show(single_head_bundle: Path, folder: Path) -> None:
    done = trivium("predict", single_head_bundle, folder / "a.png")
    assert done.returncode == 0
    assert "original" in done.stdout
    assert "KL clean-robust" not in done.stdout


def test_pictures_that_cannot_be_read_are_named_and_the_others_answered(
    tiny_bundle: Path, folder: Path, broken: Path
) -> None:
    done = trivium("predict", tiny_bundle, broken, folder / "a.png", folder / "absent.png", "--json")
    assert done.returncode == 1
    assert [Path(json.loads(line)["path"]).name for line in done.stdout.splitlines()] == ["a.png"]
    first, second = done.stderr.splitlines()
    assert first.startswith(f"trivium predict: {broken}: the JPEG cannot be decoded: ")
    assert second.endswith("absent.png: No such file or directory")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--router", "best"], "unknown router 'best'; this model has: clean, robust"),
        (["--top", "0"], "'0' is no whole number above 0"),
        (["--kernels", "maybe"], "invalid choice: 'maybe'"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_mistakes_have_one_clear_line(tiny_bundle: Path, folder: Path, arguments: list[str], reason: str) -> None:
    done = trivium("predict", tiny_bundle, folder, *arguments)
    assert done.returncode == 2
    assert reason in done.stderr.splitlines()[-1]


def test_a_folder_without_pictures_and_no_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    done = trivium("predict", tiny_bundle, tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no .jpg, .jpeg, .png, .webp file in this directory" in done.stderr
    done = trivium("predict", tmp_path, tmp_path / "x.png")
    assert done.stderr == f"trivium predict: {tmp_path}: no manifest.json in it, so this is no bundle\n"


def test_bundle_verify(tiny_bundle: Path, tmp_path: Path) -> None:
    done = trivium("bundle", "verify", tiny_bundle, "--run")
    assert done.returncode == 0
    assert "whole: 2 files, digests as in the manifest and the golden answers repeat" in done.stdout
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    (copy / "model.onnx").unlink()
    done = trivium("bundle", "verify", copy)
    assert (done.returncode, done.stderr) == (2, "trivium bundle: model.onnx: missing\n")


def test_bundle_show(build_bundle, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    calibration = {
        "temperature": {"clean": 1.25, "robust": 1, "combined": 0.9},
        "mixture": {"clean": 0.5, "fog": 0.5},
        "pictures": 400,
        "data": "seeded blocks \x1b[31m[bold]",
        "seed": 3,
        "routers": [{"router": "mean", "accuracy": 0.9125}, {"router": "clean", "accuracy": 0.5, "flips": 7}],
        "chosen_because": "it was ahead",
    }
    root = build_bundle(tmp_path / "calibrated", calibration=calibration, tolerances={"torch": 1.5e-6})
    done = trivium("bundle", "show", root)
    assert done.returncode == 0
    for text in (
        "tiny, version 1",
        "10: class 0, class 1",
        "clean, robust, combined",
        "32 x 32 RGB, from 36 on the shorter side, bilinear",
        "32 passes at rate 0.5, seed 7",
        "blend (it was ahead)",
        r"400 pictures of seeded blocks \x1b[31m[bold]: 0.5 clean, 0.5 fog",
        "clean 1.25",
        "0.9125",
        "flips",
        "1.5e-06",
        "model.onnx",
    ):
        assert text in done.stdout
    assert "\x1b" not in done.stdout
    assert any(
        line.startswith("kernel") and ("fused" in line or "function" in line) for line in done.stdout.splitlines()
    )


def test_bundle_schema() -> None:
    done = trivium("bundle", "schema")
    assert json.loads(done.stdout) == Manifest.model_json_schema()
