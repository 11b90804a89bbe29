"""Runs on folders of pictures, and weights that were made elsewhere."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from trivium.runtime.errors import ConfigError
from trivium.train.checkpoint import load_student
from trivium.train.models.backbone import create
from trivium.train.pipeline import train
from trivium.train.recipe import Recipe
from trivium.train.shifts.views import CleanSpec, Shifts, ShiftSpec, clean_view

NET = "trivium_resnet10_tiny"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of 48 x 40 colour pictures, told apart by their stripes."""
    rng = np.random.default_rng(0)
    for label in ("across", "down"):
        (tmp_path / "pictures" / "train" / label).mkdir(parents=True)
        for number in range(24):
            picture = rng.integers(0, 60, (48, 40, 3), dtype=np.uint8)
            (picture if label == "across" else picture.transpose(1, 0, 2))[:: rng.integers(3, 6)] += 180
            Image.fromarray(picture).save(tmp_path / "pictures" / "train" / label / f"{number}.png")
    return tmp_path / "pictures"


def recipe(root: Path, **changes: Any) -> Recipe:
    schedule = {"epochs": 1, "batch": 8, "lr": 0.01}
    settings: dict[str, Any] = {
        "name": "stripes",
        "threads": torch.get_num_threads(),
        "data": {"kind": "imagefolder", "root": root},
        "input": {"height": 32, "width": 32, "resize": 36},
        "views": {"crop": "resized"},
        "shifts": {"augmix": 0.25, "pixmix": 0.25, "structural": 0.5, "mixing_set": 4},
        "original": {"model": NET, "schedule": schedule},
        "teacher": {"model": NET, "schedule": schedule, "loss": "jsd"},
        "preflight": "warn",
        "heads": {"names": ["combined", "robust"], "depth": 2, "tail": "shared"},
        "student": {"schedule": schedule},
    }
    return Recipe.model_validate(settings | changes)


def test_a_folder_of_pictures_and_two_heads(folder: Path, tmp_path: Path) -> None:
    train(recipe(folder), tmp_path / "run", Console(file=io.StringIO()))
    student, meta = load_student(tmp_path / "run")
    assert student.head_names == ("combined", "robust")
    assert meta.classes == ["across", "down"]
    assert (meta.preprocessing.resize, meta.preprocessing.height) == (36, 32)
    assert 0 < meta.preprocessing.mean[0] < 1
    assert student.features(torch.randn(2, 3, 32, 32)).shape == (2, 64)
    assert list(meta.costs) == ["original", "teacher", "preflight", "student"]


def test_weights_from_a_file(folder: Path, tmp_path: Path) -> None:
    source = create(NET, 2)
    torch.save(source.state_dict(), tmp_path / "two.pth")
    given = {"original": {"model": NET, "weights": str(tmp_path / "two.pth")}, "teacher": None}
    train(recipe(folder, **given), tmp_path / "run", Console(file=io.StringIO()))
    student, meta = load_student(tmp_path / "run")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(student.original_logits(x), source.eval()(x))
    assert meta.preprocessing.mean == (0.5, 0.5, 0.5)
    assert meta.costs["original"].pictures == 0

    torch.save(create(NET, 7).state_dict(), tmp_path / "seven.pth")
    wrong = {"original": {"model": NET, "weights": str(tmp_path / "seven.pth")}}
    with pytest.raises(ConfigError, match=r"original\.schedule to fine-tune"):
        train(recipe(folder, **wrong), tmp_path / "other", Console(file=io.StringIO()))


def test_clean_views_keep_what_they_move() -> None:
    x = torch.rand(64, 1, 8, 8)
    same = clean_view(x, CleanSpec(flip=False), torch.Generator().manual_seed(0))
    assert torch.equal(same, x)
    flipped = clean_view(x, CleanSpec(), torch.Generator().manual_seed(0))
    for before, after in zip(x, flipped, strict=True):
        assert torch.equal(before, after) or torch.equal(before.flip(2), after)
    moved = clean_view(x, CleanSpec(flip=False, pad=1), torch.Generator().manual_seed(0))
    for before, after in zip(x, moved, strict=True):
        padded = torch.nn.functional.pad(before, (1, 1, 1, 1))
        assert any(torch.equal(padded[:, i : i + 8, j : j + 8], after) for i in range(3) for j in range(3))


def test_shifted_views_are_drawn_from_the_generator_alone() -> None:
    shifts = Shifts(ShiftSpec(augmix=0.4, pixmix=0.4, structural=0.2, mixing_set=5), (28, 28), seed=0, grey=True)
    x = torch.rand(32, 1, 28, 28).expand(-1, 3, -1, -1).contiguous()
    one = shifts(x, torch.Generator().manual_seed(1))
    two = shifts(x, torch.Generator().manual_seed(1))
    other = shifts(x, torch.Generator().manual_seed(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert one.min() >= 0
    assert one.max() <= 1
    assert (one != x).flatten(1).any(1).float().mean() > 0.7
