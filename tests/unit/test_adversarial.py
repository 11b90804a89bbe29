"""Adversarial training: losses, modes, figures, and whole runs on small pictures."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from trivium.runtime.errors import ConfigError
from trivium.train.checkpoint import load_classifier, load_student
from trivium.train.loop import Machine, TrainingDiverged, rate
from trivium.train.methods import adversarial
from trivium.train.methods.adversarial import Adversarial, AdversarialTraining, Attack
from trivium.train.methods.losses import at_loss, trades_loss
from trivium.train.models.backbone import create
from trivium.train.models.stages import split
from trivium.train.models.twins import spread_wings, twin_norms
from trivium.train.pipeline import train
from trivium.train.recipe import Recipe, load_recipe

RNG = np.random.default_rng(0)
B, C = 7, 5
CLEAN, ATTACKED = (RNG.normal(size=(B, C)) * 3 for _ in range(2))
LABELS = RNG.integers(0, C, B)
SCHEDULE = {"epochs": 1, "batch": 32, "optimizer": "sgd", "lr": 0.02}
RECIPE: dict[str, Any] = {
    "name": "digits",
    "threads": 1,
    "data": {"kind": "digits", "limit": {"train": 160, "calibration": 32}},
    "input": {"height": 16, "width": 16, "resize": 16},
    "views": {"flip": False},
    "shifts": {"mixing_set": 4},
    "original": {"model": "trivium_resnet10_tiny", "schedule": {"epochs": 1, "batch": 32, "lr": 0.005}},
    "heads": {"names": ["robust"], "depth": "all"},
    "adversarial": {"schedule": SCHEDULE, "attack": {"eps": 0.1, "steps": 2}, "wings": "twins", "held_out": 32},
}


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate({**RECIPE, "adversarial": {**RECIPE["adversarial"], **changes}})


def quiet() -> Console:
    return Console(file=io.StringIO())


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def cross_entropies(z: np.ndarray) -> np.ndarray:
    return -log_softmax(z)[np.arange(B), LABELS]


def divergences() -> np.ndarray:
    p, q = log_softmax(CLEAN), log_softmax(ATTACKED)
    return (np.exp(p) * (p - q)).sum(-1)


def t(a: np.ndarray) -> Tensor:
    return torch.from_numpy(a)


def test_at_loss():
    ce = cross_entropies(ATTACKED)
    assert at_loss(t(ATTACKED), t(LABELS)).item() == pytest.approx(ce.mean(), rel=1e-12)
    wanted = 0.4 * ce[:3].mean() + ce[3:].mean()
    assert at_loss(t(ATTACKED), t(LABELS), first=3, weight=0.4).item() == pytest.approx(wanted, rel=1e-12)


def test_trades_loss():
    ce, kl = cross_entropies(CLEAN), divergences()
    given = t(CLEAN), t(ATTACKED), t(LABELS), 6.0
    assert trades_loss(*given).item() == pytest.approx(ce.mean() + 6 * kl.mean(), rel=1e-12)
    by_batch = 0.4 * (ce[:3].mean() + 6 * kl[:3].sum() / B) + ce[3:].mean() + 6 * kl[3:].sum() / B
    assert trades_loss(*given, first=3, weight=0.4).item() == pytest.approx(by_batch, rel=1e-12)
    by_wing = 0.4 * (ce[:3].mean() + 6 * kl[:3].mean()) + ce[3:].mean() + 6 * kl[3:].mean()
    assert trades_loss(*given, 3, 0.4, "wing").item() == pytest.approx(by_wing, rel=1e-12)


def test_trades_moves_both_answers():
    clean, attacked = t(CLEAN).requires_grad_(), t(ATTACKED).requires_grad_()
    divergence = trades_loss(clean, attacked, t(LABELS), 1.0) - at_loss(clean, t(LABELS))
    for gradient in torch.autograd.grad(divergence, [clean, attacked]):
        assert gradient.abs().sum() > 0


class Pictures:
    """What AdversarialTraining asks of a feed, for pictures in memory."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = torch.rand(count, 3, 28, 28, generator=generator), torch.arange(count) % 4
        self.pictures = range(count)
        self.machine = Machine(torch.device("cpu"), "float32")

    def fetch(self, indices: np.ndarray, generator: torch.Generator) -> Tensor:
        return self.x[indices]

    def labels(self, indices: np.ndarray) -> Tensor:
        return self.y[indices]

    def clean(self, pictures: Tensor, generator: torch.Generator) -> Tensor:
        return pictures

    def answer(self, model: nn.Module) -> nn.Module:
        return model


def training(tmp_path: Path, feed: Pictures, **settings: Any) -> tuple[nn.Module, AdversarialTraining]:
    torch.manual_seed(0)
    net = create("trivium_resnet10_tiny", 4)
    chosen = Adversarial.model_validate({"schedule": SCHEDULE, "attack": {"eps": 0.1, "steps": 3}, **settings})
    if chosen.wings != "single":
        spread_wings(net, freeze=chosen.wings == "twins")
    return net, AdversarialTraining(feed, net, lambda: net, chosen, tmp_path, "mark", [])  # type: ignore[arg-type]


def test_the_attack_sees_the_adaptive_wing_in_evaluation(tmp_path, monkeypatch):
    feed, given = Pictures(9), list[Tensor]()
    net, objective = training(tmp_path, feed, wings="twins")
    norm = next(twin_norms(net))
    seen: list[tuple[bool, str, int]] = []
    norm.first.register_forward_pre_hook(lambda m, x: seen.append((net.training, "first", len(x[0]))))
    norm.adaptive.register_forward_pre_hook(lambda m, x: seen.append((net.training, "adaptive", len(x[0]))))
    attack = objective._attack

    def kept(*arguments: Any) -> Tensor:
        given.append(attack(*arguments))
        return given[-1]

    monkeypatch.setattr(objective, "_attack", kept)
    before = {key: value.clone() for key, value in net.state_dict().items() if "running_" in key}
    net.train()
    objective.loss(feed.x, np.arange(9), torch.Generator().manual_seed(0))
    assert seen == [*[(False, "adaptive", 9)] * 3, (True, "first", 4), (True, "adaptive", 5)]
    assert net.training
    change = (given[0] - feed.x).abs()
    assert change.max() <= 0.1 + 1e-6
    assert change.mean() > 0.03
    # one batch moved the adaptive statistics, by a tenth of the way; the attack moved none, nor any gradient
    assert all(parameter.grad is None for parameter in net.parameters())
    for key, value in net.state_dict().items():
        if "running_" in key:
            assert torch.equal(value, before[key]) == (".first." in key)
    assert int(norm.adaptive.num_batches_tracked) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_the_attack_raises_what_it_is_told_to(tmp_path, loss):
    feed = Pictures(16)
    net, objective = training(tmp_path, feed, attack={"eps": 0.1, "steps": 10, "loss": loss})
    attacked = objective._attack(feed.x, feed.y, torch.Generator().manual_seed(0))
    noisy = (feed.x + 0.1 * torch.randn_like(feed.x).sign()).clamp(0, 1)
    net.eval()
    with torch.no_grad():
        clean = net(feed.x)
        values = [
            at_loss(net(x), feed.y) if loss == "ce" else trades_loss(clean, net(x), feed.y, 1.0)
            for x in (attacked, noisy)
        ]
    assert values[0] > values[1]


def test_settling_moves_only_adaptive_statistics_and_only_once(tmp_path):
    feed = Pictures(8)
    net, objective = training(tmp_path, feed, wings="twins", settle=3)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    objective._settle(8, torch.Generator().manual_seed(0))
    moved = {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert moved == {key for key in before if ".adaptive." in key and key.endswith(statistics)}
    tracked = next(twin_norms(net)).adaptive.num_batches_tracked
    assert int(tracked) == 3  # type: ignore[arg-type]
    for count in (4, 5):
        objective.loss(feed.x, np.arange(8), torch.Generator().manual_seed(0))
        assert int(tracked) == count  # type: ignore[arg-type]


def test_gradient_norms_are_those_of_whole_steps():
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    wanted = []
    with adversarial.gradient_norms() as norms:
        for step in range(3):
            for part in range(2):  # a batch in two slices
                layer(torch.ones(1, 3) * (step + part + 1)).square().sum().backward()
            wanted.append(torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None]).norm().item())
            optimizer.step()
            optimizer.zero_grad()
    assert norms == pytest.approx(wanted, rel=1e-6)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert len(norms) == 3


@pytest.mark.parametrize(("wings", "loss"), [("single", "at"), ("twins", "trades"), ("adaptive", "at")])
def test_a_run_ends_in_an_ordinary_network_of_one_head(tmp_path, wings, loss):
    meta = train(recipe(wings=wings, loss=loss), tmp_path / "run", quiet())
    student, _ = load_student(tmp_path / "run")
    assert student.head_names == ("robust",)
    assert not list(twin_norms(student))
    figures = meta.results["adversarial"]
    assert 0 <= figures["pgd"] <= figures["clean"] <= 1
    assert figures["best_gap"] == 0
    assert figures["weight_distance"] > 0
    assert figures["gradient_norm"] > 0
    classifier, _ = load_classifier(str(tmp_path / "run"))
    fresh = create("trivium_resnet10_tiny", 10)
    assert classifier.state_dict().keys() == split(fresh, 16, 16).state_dict().keys()
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(classifier(x), student(x)[:, 0])
        assert not torch.equal(classifier(x), student.original_logits(x))
    assert not list((tmp_path / "run").rglob("best-*"))


def test_interrupted_and_resumed_is_bit_identical(tmp_path, monkeypatch):
    changes = {
        "schedule": {**SCHEDULE, "epochs": 3, "batch": 33, "decay": [0.5]},
        "settle": 2,
        "keep": "best",
        "source": {"data": {"kind": "digits", "classes": ["3", "1"]}, "schedule": SCHEDULE},
    }
    straight = train(recipe(**changes), tmp_path / "straight", quiet())
    asked = AdversarialTraining.check
    calls: list[int] = []

    def broken(self: AdversarialTraining) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 3:  # after the source's epoch and one of the fine-tuning
            raise KeyboardInterrupt
        return asked(self)

    monkeypatch.setattr(AdversarialTraining, "check", broken)
    with pytest.raises(KeyboardInterrupt):
        train(recipe(**changes), tmp_path / "broken", quiet())
    resumed = train(recipe(**changes), tmp_path / "broken", quiet())
    assert resumed.costs["adversarial"].resumed == 1
    assert resumed.weights_sha256 == straight.weights_sha256
    assert {**resumed.results, "adversarial": None} == {**straight.results, "adversarial": None}
    for key in ("clean", "pgd", "best_gap", "weight_distance", "gradient_norm"):
        assert resumed.results["adversarial"][key] == straight.results["adversarial"][key], key


def test_best_keeps_the_epoch_of_the_highest_score(tmp_path, monkeypatch):
    scores = iter([1.0, 0.5, 1.0, 0.4])  # clean and attacked, of two epochs
    monkeypatch.setattr(adversarial, "accuracy", lambda *arguments: next(scores))
    schedule = {**SCHEDULE, "epochs": 2}
    meta = train(recipe(keep="best", schedule=schedule, wings="single"), tmp_path / "best", quiet())
    assert meta.results["adversarial"]["best_gap"] == pytest.approx(0.1)
    scores = iter([1.0, 0.5, 1.0, 0.4])  # clean and attacked, of two epochs
    train(recipe(schedule=schedule, wings="single"), tmp_path / "final", quiet())
    best, final = (load_student(tmp_path / name)[0].state_dict() for name in ("best", "final"))
    tracked = "branches.0.0.model.bn1.num_batches_tracked"
    assert int(final[tracked]) - int(best[tracked]) == 160 // 32
    assert not torch.equal(best["heads.0.weight"], final["heads.0.weight"])


def test_a_robust_start_on_other_classes_gets_a_new_final_layer(tmp_path):
    source = {"data": {"kind": "digits", "classes": ["3", "1"]}, "schedule": SCHEDULE}
    meta = train(recipe(source=source), tmp_path, quiet())
    assert list(meta.costs) == ["original", "source", "adversarial"]
    assert meta.results["source"]["clean"] > 0.3
    state = json.loads((tmp_path / "source" / "stage.json").read_text())
    assert state["cost"]["parameters"] < meta.costs["adversarial"].parameters
    assert len(load_student(tmp_path)[1].classes) == 10


def test_a_loss_that_is_no_number_is_one_line_and_keeps_the_last_epoch(tmp_path):
    schedule = {**SCHEDULE, "epochs": 2}
    train(recipe(schedule=schedule), tmp_path, quiet())
    wild = recipe(schedule={**schedule, "lr": 1e30, "warmup": 0.0})
    with pytest.raises(
        TrainingDiverged, match=r"adversarial: the loss is (nan|inf) in epoch .*adversarial\."
    ) as caught:
        train(wild, tmp_path, quiet())
    assert "\n" not in str(caught.value)
    assert load_student(tmp_path)[1].recipe["adversarial"]["schedule"]["lr"] == 0.02


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": {"names": ["clean", "robust"], "depth": "all"}}, "one head"),
        ({"heads": {"names": ["robust"], "freeze_norm": True}}, "no wing to adapt"),
        ({"teacher": RECIPE["original"]}, "no use for a teacher"),
        ({"student": {"schedule": SCHEDULE}}, "one method"),
        ({"adversarial": {"schedule": SCHEDULE, "settle": 3}}, "settle needs wings"),
        ({"adversarial": {"schedule": SCHEDULE, "attack": {"eps": "8/0"}}}, "number"),
    ],
)
def test_recipes_that_cannot_be(change, words):
    with pytest.raises(ValueError, match=words):
        Recipe.model_validate({**RECIPE, **change})


def test_networks_without_batch_norm_are_one_line(tmp_path):
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2}
    original = {"model": "vit_tiny_patch16_224", "kwargs": small, "schedule": SCHEDULE}
    with pytest.raises(ConfigError, match="two wings differ in their batch norms") as caught:
        train(Recipe.model_validate({**RECIPE, "original": original}), tmp_path, quiet())
    assert "\n" not in str(caught.value)


def test_the_rate_falls_in_steps():
    at = [0.05, 0.2, 0.49, 0.5, 0.9, 0.96]
    assert [rate(each, 0.1, [0.5, 0.95]) for each in at[1:]] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert 0 < rate(at[0], 0.1, [0.5]) < 1


def test_lengths_may_be_fractions():
    assert Attack.model_validate({"eps": "8/255"}).eps == 8 / 255
    assert Attack.model_validate({"eps": "8/255"}).stride == 2 / 255
    settings = load_recipe("twins", ["adversarial.attack.step=1/40"]).adversarial
    assert settings is not None
    assert settings.attack.stride == 0.025
