"""`trivium export` as a user runs it: checkpoints and timm models in, verified bundles out, mistakes in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import numpy_helper
from safetensors.torch import save_file

from trivium.export.pack import golden_pictures
from trivium.runtime.bundle import Preprocessing, digest, open_bundle
from trivium.runtime.cli import main
from trivium.runtime.engine import Engine
from trivium.train.checkpoint import CHECKPOINT, load_student
from trivium.train.data.pictures import DataSpec, load_pictures
from trivium.train.models.mc import predict

HEADS = ("clean", "robust", "combined")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """trivium export WORDS -> (exit status, stdout, stderr), in this process."""

    def export(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["trivium", "export", *map(str, words)])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        return status, *capfd.readouterr()

    return export


def test_a_checkpoint_becomes_a_bundle_twice_the_same(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    status, out, err = run(checkpoint, first, "--name", "digits-3", "--head-weights", "float32")
    assert (status, err) == (0, "")
    assert "function - torch" in out
    assert "negative flips" in out
    assert run(checkpoint, second, "--name", "digits-3", "--head-weights", "float32")[0] == 0
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["first", "second"]
    for name in ("manifest.json", "model.onnx", "golden.npz"):
        assert digest(first / name) == digest(second / name)

    bundle = open_bundle(first)
    manifest = bundle.manifest
    assert (manifest.name, manifest.heads, manifest.dropout.passes) == ("digits-3", list(HEADS), 8)
    assert manifest.calibration is not None
    assert manifest.calibration.pictures == 60
    assert manifest.guarantees is None
    assert "no guarantees: they need 131 calibration pictures" in out
    compared = {row["router"] for row in manifest.calibration.routers if not row["control"]}
    assert compared == {*HEADS, "mean", "min_entropy", "paper", "blend", "gate"}
    assert manifest.router.paper is not None
    assert manifest.router.blend is not None
    assert manifest.router.gate is not None
    assert manifest.tolerances["function - torch: probabilities"] < 1e-4
    assert manifest.provenance["recipe"]["original"]["weights"] == "weights.pth"
    assert manifest.training["costs"]["student"]["cpu_seconds"] == 1.5

    student, _ = load_student(checkpoint)
    images = golden_pictures(manifest.preprocessing, 1)
    temperature = [manifest.calibration.temperature[head] for head in HEADS]
    batch = torch.from_numpy(images).permute(0, 3, 1, 2)
    expected, _ = predict(student, iter([batch]), manifest.preprocessing, manifest.dropout, temperature)
    for a, b in zip(Engine(bundle, kernels="off").run(images), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_an_export_promises_on_pictures_that_its_router_was_not_fitted_on(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    more = Path(shutil.copytree(checkpoint, tmp_path / "student"))
    document = json.loads((more / CHECKPOINT).read_text())
    settings = Preprocessing.model_validate(document["preprocessing"])
    data = load_pictures(DataSpec(kind="digits", calibration=0.2), "calibration", settings).describe()
    (more / CHECKPOINT).write_text(json.dumps(document | {"data": data}))
    assert data["counts"]["calibration"] == 359

    status, out, err = run(more, tmp_path / "bundle")
    assert (status, err) == (0, "")
    assert "calibrate temperatures and router on 180 pictures" in out
    assert "find on 179 other pictures what may be promised" in out
    assert "not certified" in out
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert manifest.calibration is not None
    assert manifest.calibration.pictures == 180
    guarantees = manifest.guarantees
    assert guarantees is not None
    assert (guarantees.tuning_pictures, guarantees.pictures) == (44, 135)
    assert list(guarantees.routers) == manifest.routers()
    assert guarantees.date == "2023-11-14"
    assert "calibration split" in guarantees.data

    # the same by hand, on what the export left of the split, finds the same
    monkeypatch.setattr(
        "sys.argv", ["trivium", "calibrate", str(tmp_path / "bundle"), "--out", str(tmp_path / "again")]
    )
    main()
    assert open_bundle(tmp_path / "again").manifest.guarantees == guarantees


def test_head_weights_are_rounded_to_bfloat16_and_the_table_says_what_that_changes(
    run: Run, checkpoint: Path, tmp_path: Path
) -> None:
    def heads(bundle: str) -> np.ndarray:
        model = onnx.load(tmp_path / bundle / "model.onnx")
        found = next(value for value in model.graph.initializer if value.name == "heads.weights")
        return numpy_helper.to_array(found)

    status, out, _ = run(checkpoint, tmp_path / "rounded", "--no-calibrate")
    assert status == 0
    assert "bfloat16 - float32 heads" in out
    status, out, _ = run(checkpoint, tmp_path / "whole", "--no-calibrate", "--head-weights", "float32")
    assert status == 0
    assert "bfloat16" not in out
    student, _ = load_student(checkpoint)
    np.testing.assert_array_equal(heads("whole"), student.head_weights()[0].detach().numpy())
    np.testing.assert_array_equal(
        heads("rounded"), student.head_weights()[0].detach().to(torch.bfloat16).float().numpy()
    )
    assert (heads("rounded") != heads("whole")).any()
    tolerances = open_bundle(tmp_path / "rounded").manifest.tolerances
    assert 0 < tolerances["bfloat16 - float32 heads: probabilities"] < 0.01


def test_passes_router_and_calibration_can_be_set(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    words = (
        checkpoint,
        tmp_path / "b",
        "--no-calibrate",
        "--passes",
        5,
        "--dropout",
        0.3,
        "--router",
        "mean",
        "--version",
        7,
    )
    assert run(*words)[0] == 0
    manifest = open_bundle(tmp_path / "b").manifest
    assert (manifest.dropout.passes, manifest.dropout.rate, manifest.version) == (5, 0.3, "7")
    assert (manifest.router.default, manifest.calibration) == ("mean", None)
    status, _, err = run(*words)
    assert (status, err.count("\n")) == (2, 1)
    assert "--force replaces it" in err
    assert run(checkpoint, tmp_path / "b", "--no-calibrate", "--force")[0] == 0
    assert open_bundle(tmp_path / "b").manifest.router.default == "combined"


def test_the_plan_comes_first_and_a_dry_run_writes_nothing(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    words = (checkpoint, tmp_path / "new" / "b", "--passes", 6)
    status, out, err = run(*words, "--dry-run", "--json")
    assert status == 0
    document = json.loads(out)
    assert (document["status"], document["plan"]["passes"]) == ("planned", 6)
    assert "calibrate temperatures and router on 60 pictures" in document["plan"]["steps"]
    for number, step in enumerate(document["plan"]["steps"], 1):
        assert f"{number}. {step}" in err
    assert list(tmp_path.iterdir()) == []

    status, out, err = run(*words, "--no-calibrate", "--json")
    assert status == 0
    document = json.loads(out)
    for number, step in enumerate(document["plan"]["steps"], 1):
        assert f"{number}/{len(document['plan']['steps'])} {step}" in err
    assert {Path(file["path"]).name for file in document["artefacts"]} == {"manifest.json", "model.onnx", "golden.npz"}
    assert all(digest(Path(file["path"])) == file["sha256"] for file in document["artefacts"])
    assert all(row["value"] <= row["limit"] for row in document["parity"])


def test_int8_a_folded_router_and_a_model_repository_in_one_run(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    words = ("--precision", "int8", "--fold-router", "--target", "onnx,triton", "--max-drop", "100", "--json")
    status, out, _ = run(checkpoint, tmp_path / "b", *words)
    assert status == 0
    document = json.loads(out)
    bundle = open_bundle(tmp_path / "b")
    manifest = bundle.manifest
    assert (manifest.precision, manifest.quantization and manifest.quantization.activations) == ("int8", "uint8")
    assert manifest.drift["pictures"] == 30
    assert document["drift"] == manifest.drift
    assert manifest.tolerances["folded router - NumPy: head"] == 0
    assert manifest.folded_router is not None
    assert manifest.folded_router.router == manifest.router.default
    model = onnx.load(bundle.model_path)
    assert [output.name for output in model.graph.output][5:] == ["routed_probabilities", "class_id", "head"]
    assert any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    assert (tmp_path / "b-triton" / "digits" / "config.pbtxt").is_file()
    assert str(tmp_path / "b-triton" / "digits" / "config.pbtxt") in {file["path"] for file in document["artefacts"]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "b-triton"]
    Engine(bundle).self_test()


def test_tensorrt_where_there_is_none_is_one_line(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    if find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed")
    status, _, err = run(checkpoint, tmp_path / "b", "--target", "tensorrt")
    assert (status, err.count("\n")) == (1, 1)
    assert "pip install 'trivium[tensorrt]'" in err
    assert list(tmp_path.iterdir()) == []


def test_a_timm_model_becomes_a_bundle_with_one_head(run: Run, tmp_path: Path) -> None:
    weights, labels = tmp_path / "weights.safetensors", tmp_path / "labels.txt"
    torch.manual_seed(1)
    save_file(timm.create_model("test_vit").state_dict(), weights)
    labels.write_text("\n".join(f"thing {i}" for i in range(1000)))
    words = ("--timm", "test_vit", "--weights", weights, "--mean", "0.4", "--std", ".2,.3,.4", "--dropout", ".1")
    status, out, err = run(*words, "--labels", labels, tmp_path / "b")
    assert (status, err) == (0, "")
    assert "router original" in out
    bundle = open_bundle(tmp_path / "b")
    manifest = bundle.manifest
    assert (manifest.name, manifest.heads, manifest.classes[999]) == ("test_vit", ["original"], "thing 999")
    assert (manifest.preprocessing.mean, manifest.preprocessing.std) == ((0.4, 0.4, 0.4), (0.2, 0.3, 0.4))
    assert (manifest.dropout.rate, manifest.dropout.passes) == (0.1, 32)
    assert manifest.provenance["weights_sha256"] == digest(weights)
    engine = Engine(bundle, kernels="off")
    found = engine.run(golden_pictures(manifest.preprocessing, 1))
    assert (found.mutual_information > 0).all(), "dropout passes differ, so there is epistemic uncertainty"

    assert run(*words, tmp_path / "imagenet")[0] == 0
    assert open_bundle(tmp_path / "imagenet").manifest.classes[0] == "tench, Tinca tinca"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--timm", "tf_eficientnet_lite0", "B"), "nearest: tf_efficientnet_lite0"),
        (("tf_eficientnet_lite0", "B"), "nearest: tf_efficientnet_lite0"),
        (("OTHER", "B"), "schema version 2, this release reads 1"),
        (("--timm", "test_vit", "--weights", "absent.pth", "B"), "no such weights file"),
        (("--timm", "test_vit", "--weights", "labels.txt", "B"), "labels.txt"),
        (("--timm", "test_vit", "--weights", "resnet.safetensors", "B"), "not weights of this model"),
        (("--timm", "test_resnet", "--weights", "resnet.safetensors", "--labels", "labels.txt", "B"), "2 names, but"),
        (("--timm", "test_vit", "--router", "paper", "B"), "has one head, original"),
        (("./absent", "B"), "absent: no checkpoint.json in it"),
        (("CHECKPOINT", "B", "--labels", "labels.txt"), "go with timm models"),
        (("CHECKPOINT", "B", "--no-calibrate", "--router", "paper"), "router.default 'paper' is none of"),
        (("CHECKPOINT", "B", "--router", "sideways"), "no router 'sideways'"),
        (("CHECKPOINT", "B", "--name", "a/b"), "name"),
        (("CHECKPOINT", "B", "--version", "one"), "version"),
        (("CHECKPOINT", "B", "--calibration-pictures", "5"), "at least 30 pictures"),
        (("CHECKPOINT", "labels.txt", "--force"), "is no bundle"),
        (("CHECKPOINT", "B", "--no-calibrate", "--precision", "int8"), "give some with --calibration FOLDER"),
        (("CHECKPOINT", "B", "--precision", "int8", "--calibration", "other"), "0 pictures, at least 16"),
        (("CHECKPOINT", "B", "--precision", "int8", "--calibration", "nowhere"), "no such directory"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels.txt").write_text("shirt\ncoat\n")
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "resnet.safetensors")
    (tmp_path / "other").mkdir()
    meta = json.loads((checkpoint / "checkpoint.json").read_text())
    (tmp_path / "other" / "checkpoint.json").write_text(json.dumps(meta | {"schema_version": 2}))
    place = {"CHECKPOINT": str(checkpoint), "OTHER": "other"}
    before = sorted(path.name for path in tmp_path.iterdir())
    status, _, err = run(*(place.get(word, word) for word in words))
    assert status != 0
    assert reason in err
    assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "words",
    [
        "",
        "a",
        "a b c",
        "--timm test_vit",
        "a b --passes 0",
        "--timm test_vit b --std 0",
        "--timm test_vit b --mean 1,2",
        "--timm test_vit b --dropout 1",
        "a b --target openvino",
        "a b --max-drop -1",
    ],
)
def test_wrong_usage_shows_the_usage(run: Run, words: str) -> None:
    status, _, err = run(*words.split())
    assert status == 2
    assert "usage: trivium export SOURCE BUNDLE" in err
