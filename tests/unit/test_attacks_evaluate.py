"""Accuracy under attack as trivium evaluate reports it: a bench of answerers, and the command over a checkpoint."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.commands import called
from torch import Tensor, nn

from trivium.runtime.bundle import Dropout, Preprocessing, RouterSettings
from trivium.runtime.errors import ConfigError
from trivium.train import evaluate_cli
from trivium.train.attacks.system import System
from trivium.train.calibration.comparison import provisional
from trivium.train.checkpoint import Architecture, CheckpointMeta, package_versions, save_checkpoint
from trivium.train.data.pictures import DataSpec, Pictures, load_pictures
from trivium.train.evaluation import adversarial
from trivium.train.evaluation.adversarial import (
    Bench,
    Threat,
    attack_system,
    choose_answerers,
    parse_attacks,
    parse_eps,
    parse_threat,
)
from trivium.train.evaluation.results import Results, read_results
from trivium.train.models.backbone import create, split
from trivium.train.models.mc import normalise
from trivium.train.models.student import Student

SMALL = Preprocessing(height=8, width=8, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
LINEAR = Dropout(rate=0.0, passes=1, seed=0)


class Pair(nn.Module):
    """Two linear classifiers of digits by ridge regression, the second of a tenth of the pictures."""

    head_names: tuple[str, ...] = ("full", "poor")

    def __init__(self, pictures: Pictures) -> None:
        super().__init__()
        x = normalise(pictures.batch(range(len(pictures))), SMALL).flatten(1)
        target = 10 * torch.eye(10)[torch.from_numpy(pictures.labels)]
        parts = [(x, target), (x[:120], target[:120])]
        weights = [torch.linalg.solve(a.T @ a + 50 * torch.eye(192), a.T @ b).T for a, b in parts]
        self.heads = nn.Parameter(torch.stack(weights))

    def features(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def head_weights(self) -> tuple[Tensor, Tensor]:
        return self.heads, torch.zeros(2, 10)

    def original_logits(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.heads[1].T


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    return load_pictures(DataSpec(kind="digits"), "test", SMALL)


@pytest.fixture(scope="module")
def system(pictures: Pictures) -> System:
    model = Pair(load_pictures(DataSpec(kind="digits"), "train", SMALL))
    manifest = provisional(
        pictures.classes, model.head_names, SMALL, LINEAR, RouterSettings.model_validate({"default": "min_entropy"})
    )
    return System(model, manifest)


def test_threats_and_lists_are_read() -> None:
    assert parse_threat("linf:8/255") == Threat("linf", 8 / 255)
    assert parse_threat(" L2:0.5") == Threat("l2", 0.5)
    assert parse_eps("2/255") == 2 / 255
    assert parse_attacks("adaptive, pgd") == ("pgd", "adaptive")


@pytest.mark.parametrize("text", ["8/255", "linf", "l1:0.5", "linf:", "linf:x", "linf:1/0", "linf:-0.1", "linf:nan"])
def test_a_threat_that_is_none_gives_one_line(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_threat(text)
    assert "\n" not in str(caught.value)


def test_unknown_attacks_and_answerers_are_named(system: System) -> None:
    with pytest.raises(ConfigError, match="no attack 'fgsm'; there are: transfer, pgd, apgd, autoattack, adaptive"):
        parse_attacks("pgd,fgsm")
    with pytest.raises(ConfigError, match="names none"):
        parse_attacks(" , ")
    with pytest.raises(ConfigError, match="no answerer 'best' to attack; there are: default, original, full, poor"):
        choose_answerers(system, ["full", "best"])
    assert choose_answerers(system, None) == ["original", "full", "poor", "min_entropy"]
    assert choose_answerers(system, ["default", "min_entropy", "mean"]) == ["min_entropy", "mean"]


def test_rows_hold_what_was_asked_for(system: System, pictures: Pictures, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adversarial, "STEPS", dict.fromkeys(adversarial.ATTACKS, 6))
    seen: list[tuple[int, int]] = []
    found = attack_system(
        system, pictures, Threat("linf", 0.06), curve=(0, 0.02), count=20, progress=lambda *at: seen.append(at)
    )
    assert found.pictures == 20
    accuracy = {(row.answerer, row.attack, row.eps): row.accuracy for row in found.rows}
    whom = {"original": ("pgd", "apgd"), "full": ("transfer", "pgd", "apgd"), "poor": ("transfer", "pgd", "apgd"),
            "min_entropy": ("transfer", "pgd", "apgd", "adaptive")}  # fmt: skip
    assert set(accuracy) == {
        (who, how, eps) for who, attacks in whom.items() for how in attacks for eps in (0, 0.02, 0.06)
    }
    assert seen[-1] == (len(accuracy), len(accuracy))
    for (who, attack, eps), value in accuracy.items():
        if eps == 0:
            assert value == pytest.approx(found.clean[who], abs=1e-6)
        assert value <= accuracy[who, attack, 0]
        if attack == "adaptive":
            assert value <= min(accuracy[who, other, eps] for other in ("transfer", "pgd", "apgd"))
    assert found.clean["full"] > found.clean["poor"] > 0.3
    for who in whom:
        assert accuracy[who, "apgd", 0.06] < accuracy[who, "apgd", 0.02] < found.clean[who]
    again = attack_system(system, pictures, Threat("linf", 0.06), curve=(0, 0.02), count=20)
    assert again.rows == found.rows


def test_a_linear_head_falls_exactly_where_its_margin_ends(system: System, pictures: Pictures) -> None:
    """Away from the range's edge, Linf eps takes eps |w_y - w_c|_1 from the margin to class c."""
    grey = pictures.batch(range(len(pictures))).float() / 255 * 0.4 + 0.3
    labels = torch.from_numpy(pictures.labels)
    bench = Bench(system, grey, labels, "linf", 0)
    eps = 0.01
    bench.run("full", "apgd", eps)
    weights = system.model.head_weights()[0][0].detach()
    z = normalise(grey, SMALL).flatten(1) @ weights.T
    reach = eps / 0.25 * (weights[:, None] - weights).abs().sum(-1)[labels]
    left = z.gather(1, labels[:, None]) - z - reach
    left.scatter_(1, labels[:, None], torch.inf)
    sure = left.amin(1).abs() > 1e-2
    robust = bench.robust["full", "apgd", eps]
    assert 0.05 < robust.float().mean() < bench.right["full"].float().mean()
    assert (robust & sure & (left.amin(1) < 0)).sum() <= 0.05 * len(robust)  # it aims at no class in particular
    assert not (~robust & sure & (left.amin(1) > 0)).any()


def test_autoattack_is_spared_what_pgd_breaks(system: System, pictures: Pictures) -> None:
    pytest.importorskip("pyautoattack", reason="pip install 'trivium[eval]'")
    attacks = partial(attack_system, system, pictures, attacks=("pgd", "autoattack"), answerers=["full"], count=8)
    strong, weak = Threat("linf", 0.5), Threat("linf", 1e-4)
    assert [(row.attack, row.accuracy) for row in attacks(threat=strong).rows] == [("pgd", 0.0)]
    assert [row.attack for row in attacks(threat=weak, autoattack_above=0.99).rows] == ["pgd"]
    pgd, autoattack = attacks(threat=weak, autoattack_above=0.0).rows
    assert 0.0 < autoattack.accuracy <= pgd.accuracy


def command(*arguments: object) -> None:
    called(evaluate_cli.main, "evaluate", *arguments)


def test_autoattack_may_be_tried_on_some_pictures(
    system: System, pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def spoil(logits: Any, x: Tensor, labels: Tensor, *_: Any) -> Tensor:
        tried.append(len(x))
        return torch.rand(x.shape, generator=torch.Generator().manual_seed(1))

    monkeypatch.setattr(adversarial, "autoattack", spoil)
    found = attack_system(
        system, pictures, Threat("linf", 0.1), attacks=("autoattack",), answerers=["full"], count=16, autoattack_count=4
    )
    bench = adversarial.Bench(system, torch.rand(16, 3, 8, 8), torch.zeros(16, dtype=torch.long), "linf", 0, 4)
    assert (found.pictures, found.autoattack_pictures) == (16, 4)
    assert bench.few.nonzero()[:, 0].tolist() == [0, 5, 10, 15]
    assert sum(tried) <= 4
    assert found.rows[0].accuracy in (0.0, 0.25, 0.5, 0.75, 1.0)


def test_a_bundle_has_no_gradient(tiny_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="attacks need gradients, which a bundle has not: name its checkpoint"):
        command(tiny_bundle, "--data", "digits", "--attack", "linf:8/255")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    data = load_pictures(DataSpec(kind="digits"), "test", SMALL)
    original = split(create("trivium_resnet10_tiny", 10), 8, 8)
    student = Student(original, ["clean"], 0)
    meta = CheckpointMeta(
        name="tiny", classes=list(data.classes), heads=["clean"], preprocessing=SMALL,
        dropout=Dropout(rate=0.5, passes=4, seed=0), data=data.describe(), recipe={}, costs={},
        architecture=Architecture(model="trivium_resnet10_tiny", depth=0, tail="copied"),
        packages=package_versions(), weights_sha256="0" * 64,
    )  # fmt: skip
    return save_checkpoint(tmp_path_factory.mktemp("run"), student, meta)


def test_the_command_writes_and_prints_accuracy_under_attack(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(checkpoint, "--pictures", 1, "--out", tmp_path, "--attack", "linf:8/255", "--attack-pictures", 6,
            "--eps-curve", "0,2/255", "--attacks", "pgd,adaptive")  # fmt: skip
    results: Results = read_results(tmp_path / "results.json")
    assert results.attacks is not None
    assert results.attacks.norm == "linf"
    assert results.attacks.pictures == 6
    assert {row.eps for row in results.attacks.rows} == {0, round(2 / 255, 6), round(8 / 255, 6)}
    assert {row.attack for row in results.attacks.rows} == {"pgd", "adaptive"}
    assert "% right under attack, linf 0.031373, 6 pictures" in " ".join(capsys.readouterr().out.split())
    document = json.loads((tmp_path / "results.json").read_text())
    del document["attacks"]
    (tmp_path / "older.json").write_text(json.dumps(document))
    assert read_results(tmp_path / "older.json").attacks is None
