"""`trivium calibrate` as a user runs it, on the tiny bundle: manifests rewritten whole, mistakes in one line."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trivium.runtime.bundle import (
    MANIFEST,
    FoldedRouter,
    Manifest,
    open_bundle,
    read_manifest,
    rewrite_manifest,
    seal,
)
from trivium.runtime.cli import main
from trivium.train.data.pictures import load_pictures, parse_spec

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """trivium calibrate WORDS -> (exit status, stdout, stderr), in this process."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")

    def calibrate(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["trivium", "calibrate", *map(str, words)])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        return status, *capsys.readouterr()

    return calibrate


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A tiny bundle that may be written to."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "own" / "tiny"))


def test_a_bundle_gets_the_same_guarantees_each_time(run: Run, bundle: Path, labelled: Path, tmp_path: Path) -> None:
    before = (bundle / MANIFEST).read_bytes()
    words = ("--data", labelled, "--split", "all", "--negative-flips", "0.1", "--accuracy-loss", "0.1", "--seed", 3)
    for out in (tmp_path / "first", tmp_path / "second"):
        status, text, err = run(bundle, *words, "--out", out)
        assert (status, err) == (0, "")
        for said in ("→ blend", "expected calibration error: clean", "not certified", f"wrote {out}/manifest.json"):
            assert said in text
    assert (tmp_path / "first" / MANIFEST).read_bytes() == (tmp_path / "second" / MANIFEST).read_bytes()
    assert (bundle / MANIFEST).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "own", "second"]

    found = open_bundle(tmp_path / "first").manifest
    guarantees = found.guarantees
    assert guarantees is not None
    assert list(guarantees.routers) == found.routers()
    assert guarantees.mixture == {"clean": 0.5, "corrupted": 0.5}
    assert (guarantees.pictures, guarantees.tuning_pictures, guarantees.seed) == (180, 60, 3)
    assert (guarantees.date, guarantees.data) == ("2023-11-14", "pictures in folder, all pictures (seed 0)")
    plain = found.model_copy(update={"guarantees": None})
    assert plain.router.model_copy(update={"guard": None}) == read_manifest(bundle).router
    assert plain.files == read_manifest(bundle).files

    status, text, err = run(bundle, *words)
    assert (status, err) == (0, "")
    assert (bundle / MANIFEST).read_bytes() == (tmp_path / "first" / MANIFEST).read_bytes()
    assert [path.name for path in bundle.parent.iterdir()] == ["tiny"]
    status, text, _ = run(
        bundle, *words, "--score", "raps", "--mix", "clean=1", "--drift", "mixture", "--max-risk", "0.4"
    )
    assert status == 0
    again = open_bundle(bundle).manifest.guarantees
    assert again is not None
    assert (again.score, again.mixture, again.max_risk) == ("raps", {"clean": 1}, 0.4)


def test_a_kill_before_the_last_step_leaves_the_old_manifest(bundle: Path) -> None:
    old = (bundle / MANIFEST).read_bytes()
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from trivium.runtime.bundle import read_manifest, rewrite_manifest\n"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "root = Path(sys.argv[1]); rewrite_manifest(root, read_manifest(root).model_copy(update={'version': '2'}))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bundle)], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert (bundle / MANIFEST).read_bytes() == old
    assert open_bundle(bundle).manifest.version == "1"


def test_a_place_that_cannot_be_written_is_told(run: Run, bundle: Path, labelled: Path, tmp_path: Path) -> None:
    assert run(bundle, "--data", labelled, "--out", bundle)[2] == f"trivium calibrate: --out {bundle} exists\n"
    (tmp_path / "file").write_text("")
    status, _, err = run(bundle, "--data", labelled, "--split", "all", "--out", tmp_path / "file" / "copy")
    assert (status, err.count("\n")) == (2, 1)
    assert "cannot be written" in err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--coverage", "1.0"], "--coverage 1: must lie between 0 and 1, without both"),
        (["--coverage", "nan"], "--coverage nan: must lie between 0 and 1"),
        (["--max-risk", "0"], "--max-risk 0: must lie between"),
        (["--delta", "-1"], "--delta -1: must lie between"),
        (["--mix", "clean=0.5,mist=0.5"], "--mix: 'mist' is none of clean"),
        (["--mix", "clean=0.5"], "--mix clean=0.5: the shares sum to 0.5, not to 1"),
        (["--pictures", "0"], "--pictures 0: at least 1"),
        (["--seed", "-1"], "--seed -1: at least 0"),
        (["--raps-penalty", "-1"], "--raps-penalty -1: at least 0"),
        (["--pictures", "30"], "a coverage of 0.99 needs 99 calibration pictures beside the tuning part, 131 in all"),
        (["--coverage", "0.999"], "a coverage of 0.999 needs 999 calibration pictures"),
        (["--max-risk", "0.0001"], "--max-risk 0.0001 cannot be certified for router blend on 180"),
    ],
)
def test_what_cannot_be_promised_is_refused_in_one_line(
    run: Run, tiny_bundle: Path, labelled: Path, words: list[str], reason: str
) -> None:
    before = (tiny_bundle / MANIFEST).read_bytes()
    status, _, err = run(tiny_bundle, "--data", labelled, "--split", "all", *words)
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith(f"trivium calibrate: {reason}")
    assert (tiny_bundle / MANIFEST).read_bytes() == before


def test_no_bundle_no_labels_and_other_classes_are_refused(
    run: Run, tiny_bundle: Path, labelled: Path, tmp_path: Path
) -> None:
    unlabelled = tmp_path / "unlabelled"
    unlabelled.mkdir()
    for path in sorted(labelled.rglob("*.png"))[:3]:
        shutil.copy(path, unlabelled)
    other = tmp_path / "other"
    for name in ("class 1", "class 2", "gnu"):
        shutil.copytree(next(labelled.iterdir()), other / name)
    listed = tmp_path / "list.csv"
    listed.write_text("path,label\n" + "".join(f"{path},\n" for path in sorted(labelled.rglob("*.png"))[:3]))
    cases = [
        ((tmp_path / "none", "--data", labelled), f"{tmp_path / 'none'}: no such directory"),
        ((labelled, "--data", labelled), f"{labelled}: no manifest.json in it, so this is no bundle"),
        ((tiny_bundle,), "the bundle's record does not say where its data lies"),
        ((tiny_bundle, "--data", tmp_path / "none"), "neither fashion-mnist"),
        ((tiny_bundle, "--data", unlabelled), "no class directories in it"),
        ((tiny_bundle, "--data", listed), "line 2: path or label is empty"),
        ((tiny_bundle, "--data", other, "--split", "all"), "1 of 3 classes are none of the model's 10"),
    ]
    for words, reason in cases:
        status, _, err = run(*words)
        assert (status, err.count("\n")) == (2, 1), err
        assert reason in err


def test_pictures_that_the_model_has_seen_are_not_calibrated_on(run: Run, bundle: Path, labelled: Path) -> None:
    manifest = read_manifest(bundle)
    spec = parse_spec(str(labelled), calibration=0.7, test=0.1, seed=4)
    record = load_pictures(spec, "calibration", manifest.preprocessing).describe()
    calibration = {
        "temperature": dict.fromkeys(manifest.heads, 1.0),
        "mixture": {"clean": 1.0},
        "pictures": 0,
        "data": "",
        "seed": 0,
        "routers": [],
        "chosen_because": "",
    }
    count = record["counts"]["calibration"]
    for seen, reason in ((count - 20, "there are 15"), (count, f"all {count} pictures of the calibration split have")):
        document = manifest.model_dump() | {
            "provenance": {"data": record},
            "calibration": calibration | {"pictures": seen},
        }
        seal(bundle, Manifest.model_validate(document))
        status, _, err = run(bundle, "--data", labelled)
        assert (status, err.count("\n")) == (2, 1)
        assert reason in err
    assert (
        "--split all: most of these pictures trained the model" in run(bundle, "--data", labelled, "--split", "all")[2]
    )


def test_a_graph_that_holds_guarantees_itself_is_left_alone(run: Run, bundle: Path, labelled: Path) -> None:
    folded = FoldedRouter(router="blend", heads=["clean"], coverage=0.9)
    rewrite_manifest(bundle, read_manifest(bundle).model_copy(update={"folded_router": folded}))
    status, _, err = run(bundle, "--data", labelled, "--split", "all")
    assert (status, err.count("\n")) == (2, 1)
    assert "calibrate one that was exported without --fold-router" in err
