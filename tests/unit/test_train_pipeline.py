"""Runs on folders of pictures, and weights that were made elsewhere."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from trivium.runtime.errors import ConfigError, TriviumError
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


def quietly(recipe: Recipe, out: Path) -> None:
    train(recipe, out, Console(file=io.StringIO()))


def test_runs_start_from_runs(folder: Path, tmp_path: Path) -> None:
    schedule = {"epochs": 1, "batch": 8, "lr": 0.01}
    plain = {"student": {"schedule": schedule, "alpha": 0, "gamma": 0}, "teacher": None}
    first = recipe(folder, **plain, heads={"names": ["combined"], "depth": "all"})
    quietly(first, tmp_path / "first")
    tuned, meta = load_student(tmp_path / "first")
    assert meta.architecture.depth == len(list(tuned.branches[0].children())) - 1
    assert not list(tuned.trunk.children())

    x = torch.randn(2, 3, 32, 32)
    changes = {
        "original": {"model": NET, "weights": str(tmp_path / "first")},
        "heads": {"names": ["clean", "robust", "combined"], "depth": "all", "sources": {"robust": f"{tmp_path}/first"}},
    }
    quietly(recipe(folder, **plain | changes), tmp_path / "second")
    student, meta = load_student(tmp_path / "second")
    with torch.no_grad():
        torch.testing.assert_close(student.original_logits(x), tuned(x)[:, 0])
        torch.testing.assert_close(student(x)[:, 1], tuned(x)[:, 0])
        assert not torch.allclose(student(x)[:, 2], tuned(x)[:, 0])
    assert meta.preprocessing == load_student(tmp_path / "first")[1].preprocessing

    one_head = {"original": {"model": NET, "weights": f"{tmp_path}/second#robust"}}
    quietly(recipe(folder, **plain | one_head), tmp_path / "third")
    with torch.no_grad():
        torch.testing.assert_close(load_student(tmp_path / "third")[0].original_logits(x), tuned(x)[:, 0])
    for weights, reason in (
        (f"{tmp_path}/second", r"it has the heads clean, robust, combined: name one, as \S+#clean$"),
        (f"{tmp_path}/second#loud", "no head 'loud'"),
        (str(folder), "no finished training run"),
    ):
        with pytest.raises(TriviumError, match=reason):
            quietly(recipe(folder, **plain, original={"model": NET, "weights": weights}), tmp_path / "wrong")
    other = {"original": {"model": "trivium_resnet10", "weights": str(tmp_path / "first")}}
    with pytest.raises(ConfigError, match="is a run of trivium_resnet10_tiny"):
        quietly(recipe(folder, **plain | other), tmp_path / "wrong")


def test_a_clean_head_may_be_the_original_itself(folder: Path, tmp_path: Path) -> None:
    heads = {"names": ["clean", "combined"], "depth": 2, "sources": {"clean": "original"}}
    quietly(recipe(folder, teacher=None, heads=heads), tmp_path / "run")
    student, meta = load_student(tmp_path / "run")
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(student(x)[:, 0], student.original_logits(x))
        assert not torch.allclose(student(x)[:, 1], student.original_logits(x))
    assert meta.recipe["heads"]["sources"] == {"clean": "original"}


def test_the_clean_loss_may_leave_the_shared_stages_alone(folder: Path, tmp_path: Path) -> None:
    for detach in (True, False):
        settings = {"schedule": {"epochs": 1, "batch": 8, "lr": 0.01}, "detach_clean": detach}
        heads = {"names": ["clean"], "depth": 2, "tail": "shared"}
        out = tmp_path / str(detach)
        quietly(recipe(folder, teacher=None, student=settings, heads=heads), out)
        student, _ = load_student(out)
        before = dict(student.original_tail.named_parameters())
        moved = [not torch.equal(p, before[name]) for name, p in student.branches[0].named_parameters()]
        assert any(moved) != detach
        assert not torch.equal(student.head_weights()[0][0], student.original_head.state_dict()["weight"])


def test_a_head_from_elsewhere_must_share_the_frozen_stages(folder: Path, tmp_path: Path) -> None:
    schedule = {"epochs": 1, "batch": 8, "lr": 0.01}
    plain = {"student": {"schedule": schedule}, "teacher": None}
    quietly(recipe(folder, **plain, seed=1, heads={"names": ["robust"]}), tmp_path / "first")
    sourced = {"names": ["robust", "combined"], "sources": {"robust": str(tmp_path / "first")}}
    with pytest.raises(ConfigError, match=r"set heads\.depth to all$"):
        quietly(recipe(folder, **plain, seed=2, heads=sourced), tmp_path / "second")
    same = {"original": {"model": NET, "weights": f"{tmp_path}/first/original/model.safetensors"}}
    mean = {"mean": load_student(tmp_path / "first")[1].preprocessing.mean}
    quietly(
        recipe(folder, **plain | same, input={"height": 32, "width": 32, **mean}, heads=sourced), tmp_path / "third"
    )
    first, third = load_student(tmp_path / "first")[0], load_student(tmp_path / "third")[0]
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(third(x)[:, 0], first(x)[:, 0])


def test_heads_of_one_role_differ(folder: Path, tmp_path: Path) -> None:
    heads = {"names": ["combined-1", "combined-2", "combined-3"], "dropout": {"rate": 0, "passes": 1, "seed": 0}}
    quietly(recipe(folder, teacher=None, heads=heads), tmp_path / "run")
    student, _ = load_student(tmp_path / "run")
    with torch.no_grad():
        logits = student(torch.randn(2, 3, 32, 32))
    assert not torch.allclose(logits[:, 0], logits[:, 1])
    assert not torch.allclose(logits[:, 1], logits[:, 2])


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
