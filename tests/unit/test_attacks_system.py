"""Attacks on the whole routed system and through AutoAttack, on three small heads trained on scikit-learn's digits."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trivium.kernels import HeadStatistics
from trivium.runtime.bundle import Calibration, Dropout, Manifest, Preprocessing, RouterSettings
from trivium.runtime.errors import ConfigError
from trivium.runtime.router import RULES, route, routers
from trivium.train.attacks import autoattack as autoattack_module
from trivium.train.attacks.adaptive import adaptive
from trivium.train.attacks.apgd import apgd
from trivium.train.attacks.autoattack import autoattack
from trivium.train.attacks.losses import wrong_answer
from trivium.train.attacks.pgd import pgd
from trivium.train.attacks.system import SOFT, System, beyond, routing
from trivium.train.calibration.comparison import provisional
from trivium.train.calibration.observe import Observer
from trivium.train.data.pictures import DataSpec, Pictures, load_pictures
from trivium.train.models.mc import normalise

PREPROCESSING = Preprocessing(height=8, width=8, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
DROPOUT = Dropout(rate=0.5, passes=8, seed=3)
HEADS = ("clean", "robust", "combined")
FEATURES = ("divergence", "mutual_information", "energy")
DETECTOR: dict[str, Any] = {
    "weights": dict.fromkeys(FEATURES, 1.0),
    "center": {"divergence": -2.0, "mutual_information": -2.0, "energy": -4.0},
    "scale": dict.fromkeys(FEATURES, 1.0),
    "intercept": 0.0,
    "threshold": 0.5,
}
HARM = {"accuracy_loss": 0.01, "negative_flips": 0.01, "delta": 0.1}
ROUTERS: dict[str, Any] = {
    "default": "blend",
    "paper": {"divergence_threshold": 0.3, "entropy_scale": {"clean": 0.5, "robust": 0.8}},
    "blend": DETECTOR,
    "guard": DETECTOR | HARM | {"base": "gate", "threshold": 0.4},
    "gate": {
        "intercept": {"clean": 0.2, "robust": 0.0, "combined": 0.1},
        "features": [
            {"statistic": statistic, "heads": heads, "center": 0.3, "scale": 0.5, "weights": weights}
            for statistic, heads, weights in (
                ("divergence", ["clean", "robust"], {"clean": -1.0, "robust": 1.0, "combined": 0.0}),
                ("predictive_entropy", ["clean"], {"clean": -1.0, "robust": 0.0, "combined": 0.0}),
                ("mutual_information", ["robust"], {"clean": 0.0, "robust": -1.0, "combined": 0.5}),
                ("max_probability", ["combined"], {"clean": 0.0, "robust": 0.0, "combined": 1.0}),
                ("energy", ["combined"], {"clean": 0.1, "robust": 0.0, "combined": -0.1}),
            )
        ],
    },
}


class Three(nn.Module):
    """Three small networks, one a head: trained on clean pictures, on attacked ones, and on both."""

    head_names: tuple[str, ...] = HEADS

    def __init__(self, x: Tensor, labels: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Parameter(torch.randn(3, 192, 64) / 14)
        self.second = nn.Parameter(torch.randn(3, 10, 64) / 8)
        optimizer = torch.optim.Adam(self.parameters(), 3e-3)

        def loss(pictures: Tensor, head: int) -> Tensor:
            return nn.functional.cross_entropy(self.plain(normalise(pictures, PREPROCESSING), head), labels)

        for _ in range(40):
            hard = pgd(lambda p: self.plain(normalise(p, PREPROCESSING), 1), x, labels, "linf", 0.1, 0.05, 2)
            total = loss(x, 0) + loss(hard, 1) + loss(x, 2) + loss(hard, 2)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.einsum("bi,kid->bkd", x.flatten(1), self.first))

    def plain(self, x: Tensor, head: int) -> Tensor:
        return self.features(x)[:, head] @ self.second[head].T

    def head_weights(self) -> tuple[Tensor, Tensor]:
        return self.second, torch.zeros(3, 10)

    def original_logits(self, x: Tensor) -> Tensor:
        return self.plain(x, 0)


@pytest.fixture(scope="module")
def model() -> Three:
    pictures = load_pictures(DataSpec(kind="digits"), "train", PREPROCESSING)
    return Three(pictures.batch(range(300)).float() / 255, torch.from_numpy(pictures.labels[:300])).eval()


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    return load_pictures(DataSpec(kind="digits"), "test", PREPROCESSING)


@pytest.fixture(scope="module")
def manifest(pictures: Pictures) -> Manifest:
    return provisional(pictures.classes, HEADS, PREPROCESSING, DROPOUT, RouterSettings.model_validate(ROUTERS))


@pytest.fixture(scope="module")
def system(model: Three, manifest: Manifest) -> System:
    return System(model, manifest)


@pytest.fixture(scope="module")
def batch(pictures: Pictures) -> tuple[Tensor, Tensor]:
    return pictures.batch(range(24)).float() / 255, torch.from_numpy(pictures.labels[:24])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_differentiable_system_answers_as_the_runtime_does(
    model: Three, manifest: Manifest, system: System, pictures: Pictures
) -> None:
    images = pictures.batch(range(100)).permute(0, 2, 3, 1).contiguous().numpy()
    images[50:] = np.random.default_rng(0).integers(0, 256, images[50:].shape)
    observer = Observer(model, PREPROCESSING, DROPOUT)
    statistics = observer.statistics(observer.look(images)[0], [1.0] * 3)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    found = system.statistics(x)
    for own, wanted in zip(found, statistics, strict=True):
        np.testing.assert_allclose(own.detach().numpy(), wanted, rtol=1e-4, atol=1e-5)
    ids = system.class_ids(x)
    assert set(ids) == set(system.answerers) == {"original", *HEADS, *RULES}
    for name in routers(manifest):
        routed = route(statistics, manifest, name)
        answers = system.answers(x, name).detach()
        np.testing.assert_allclose(answers[:, 0].exp().numpy(), routed.probabilities, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(answers[:, 1:].exp().numpy(), statistics.probabilities, rtol=1e-4, atol=1e-5)
        assert ids[name].tolist() == routed.class_id.tolist() == answers[:, 0].argmax(1).tolist()


def test_temperatures_of_the_calibration_are_used(
    model: Three, manifest: Manifest, batch: tuple[Tensor, Tensor]
) -> None:
    record = Calibration(
        temperature={"clean": 2.0, "robust": 0.5, "combined": 1.0},
        mixture={}, pictures=0, data="none", seed=0, routers=[], chosen_because="it was asked for",
    )  # fmt: skip
    x, _ = batch
    tempered = System(model, manifest.model_copy(update={"calibration": record})).statistics(x)
    observer = Observer(model, PREPROCESSING, DROPOUT)
    wanted = observer.statistics(model.features(normalise(x, PREPROCESSING)).detach().numpy(), [2.0, 0.5, 1.0])
    np.testing.assert_allclose(tempered.probabilities.detach().numpy(), wanted.probabilities, rtol=1e-4, atol=1e-5)


def test_every_rule_has_a_soft_twin_that_leans_its_way(system: System, batch: tuple[Tensor, Tensor]) -> None:
    assert set(SOFT) == set(RULES)
    x = torch.cat([batch[0], torch.rand(24, 3, 8, 8, generator=generator())])
    statistics = system.statistics(x)
    arrays = HeadStatistics(*(each.detach().numpy() for each in statistics))
    for rule, twin in SOFT.items():
        soft = twin(statistics, system.manifest).detach()
        torch.testing.assert_close(soft.sum(1), torch.ones(len(x)))
        hard = torch.from_numpy(RULES[rule](arrays, system.manifest).weights).float()
        if rule in ("min_entropy", "gate"):
            assert torch.equal(soft.argmax(1), hard.argmax(1))
        elif rule == "paper":
            apart = hard[:, 2] == 0
            assert torch.equal(soft[:, 2] < 0.5, apart)
            assert torch.equal(soft[apart, :2].argmax(1), hard[apart, :2].argmax(1))
        elif rule == "blend":
            assert torch.equal(soft[:, 2] > 0.75, hard[:, 2] == 1)
        elif rule == "guard":
            guard = system.manifest.router.guard
            assert guard is not None
            apart = beyond(statistics, guard, guard.threshold, HEADS).detach()
            shifted, base = apart[:, 1] > 0.5, soft.clone()
            base[:, 0] -= apart[:, 0]
            assert 0 < shifted.sum() < len(x)
            assert torch.equal(base[shifted].argmax(1), hard[shifted].argmax(1))
            assert (hard[~shifted, 0] == 1).all()
        else:
            torch.testing.assert_close(soft, hard)


@pytest.mark.parametrize("rule", ["min_entropy", "paper", "blend", "gate", "guard"])
def test_the_choice_has_a_finite_gradient(system: System, batch: tuple[Tensor, Tensor], rule: str) -> None:
    x = batch[0].clone().requires_grad_()
    statistics = system.statistics(x)
    weights = routing(statistics, system.manifest, rule)
    (slope,) = torch.autograd.grad((weights * torch.tensor([1.0, 2.0, 3.0])).sum(), x)
    assert slope.isfinite().all()
    assert (slope.flatten(1).abs().sum(1) > 0).all()


def survivors(system: System, router: str, x: Tensor, labels: Tensor) -> int:
    return int((system.class_ids(x)[router] == labels).sum())


@pytest.mark.parametrize(("router", "norm"), [("combined", "linf"), ("paper", "l2"), ("gate", "linf")])
def test_the_adaptive_attack_is_as_strong_as_any_single_one(
    system: System, batch: tuple[Tensor, Tensor], router: str, norm: Any
) -> None:
    x, labels = batch
    eps = 0.08 if norm == "linf" else 0.6
    out = adaptive(system, router, x, labels, norm, eps, 8, generator())
    assert out.min() >= 0
    assert out.max() <= 1
    assert (
        torch.linalg.vector_norm((out - x).flatten(1), ord=math.inf if norm == "linf" else 2, dim=1).max() < eps + 1e-5
    )
    left = survivors(system, router, out, labels)
    assert left < survivors(system, router, x, labels)
    for source in (router, *HEADS):
        single = apgd(system.logits(source), x, labels, norm, eps, 8, generator=generator(), stop_early=True)
        assert left <= survivors(system, router, single, labels)


class Fixed(nn.Module):
    """Two heads whose answers no picture changes, right and wrong; the wrong one's energy is the picture's mean."""

    head_names: tuple[str, ...] = ("right", "wrong")

    def features(self, x: Tensor) -> Tensor:
        return x.flatten(1).mean(1, keepdim=True)

    def head_weights(self) -> tuple[Tensor, Tensor]:
        return torch.tensor([[[0.0], [0.0]], [[1.0], [1.0]]]), torch.tensor([[3.0, 0.0], [0.0, 3.0]])

    def original_logits(self, x: Tensor) -> Tensor:
        return torch.tensor([3.0, 0.0]).expand(len(x), 2) + 0 * x.flatten(1)[:, :2]


def test_the_adaptive_attack_finds_what_only_the_choice_gives_away() -> None:
    energy = math.log(1 + math.exp(3))  # of the wrong head, less the picture's mean
    gate = {
        "intercept": {"right": 0.0, "wrong": 0.0},
        "features": [
            {"statistic": "energy", "heads": ["wrong"], "center": -energy - 0.55, "scale": 1.0,
             "weights": {"right": 1.0, "wrong": -1.0}}
        ],
    }  # fmt: skip
    plain = Preprocessing(height=4, width=4, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    settings = RouterSettings.model_validate({"default": "gate", "gate": gate})
    manifest = provisional(["a", "b"], Fixed.head_names, plain, Dropout(rate=0.0, passes=1, seed=0), settings)
    system = System(Fixed(), manifest)
    x, labels = torch.full((3, 3, 4, 4), 0.5), torch.zeros(3, dtype=torch.long)
    assert survivors(system, "gate", x, labels) == 3
    for head in Fixed.head_names:
        blind = apgd(system.logits(head), x, labels, "linf", 0.1, 10, generator=generator())
        assert survivors(system, "gate", blind, labels) == 3
    assert survivors(system, "gate", adaptive(system, "gate", x, labels, "linf", 0.04, 10, generator()), labels) == 3
    assert survivors(system, "gate", adaptive(system, "gate", x, labels, "linf", 0.06, 10, generator()), labels) == 0


def test_autoattack_finds_at_least_what_a_short_pgd_finds_and_leaves_no_trace(
    system: System, batch: tuple[Tensor, Tensor]
) -> None:
    pytest.importorskip("pyautoattack", reason="pip install 'trivium[eval]'")
    x, labels = batch[0][:8], batch[1][:8]
    logits = system.logits("blend")
    state, tracer = torch.get_rng_state(), sys.gettrace()
    found = autoattack(logits, x, labels, "linf", 0.08, attacks=("apgd-ce",))
    assert torch.equal(torch.get_rng_state(), state)
    assert sys.gettrace() is tracer
    assert (found - x).abs().max() <= 0.08 + 1e-6
    with torch.no_grad():
        wrong = wrong_answer(logits(found), labels)
        weaker = wrong_answer(logits(pgd(logits, x, labels, "linf", 0.08, 0.02, 5, generator=generator())), labels)
    assert wrong.any()
    assert wrong.sum() >= weaker.sum()


@pytest.mark.parametrize("classes", [3, 4])
def test_autoattack_of_few_classes_tries_every_wrong_one(classes: int) -> None:
    """Linear classes: each picture lies at a known distance from the nearest other class."""
    pytest.importorskip("pyautoattack", reason="pip install 'trivium[eval]'")
    weights = torch.randn(48, classes, generator=generator())
    x = 0.5 + 0.05 * torch.randn(5, 3, 4, 4, generator=generator())
    z = x.flatten(1) @ weights
    labels = z.argmax(1)
    apart = (weights[:, None] - weights[:, :, None]).norm(dim=0)[labels].scatter(1, labels[:, None], torch.inf)
    distance = ((z.gather(1, labels[:, None]) - z).scatter(1, labels[:, None], torch.inf) / apart).nan_to_num(9).amin(1)
    eps = float(distance.median())
    found = autoattack(
        lambda p: p.flatten(1) @ weights, x, labels, "l2", eps, attacks=("apgd-ce", "apgd-t", "fab-t")
    )  # fmt: skip
    wrong = (found.flatten(1) @ weights).argmax(1) != labels
    assert wrong[distance < 0.98 * eps].all()
    assert not wrong[distance > 1.02 * eps].any()


def test_autoattack_warns_of_each_thing_once(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("pyautoattack", reason="pip install 'trivium[eval]'")

    def flat(x: Tensor) -> Tensor:
        return torch.tensor([1.0, 0.5, 0.2, 0.0]) + 0 * x.flatten(1)[:, :4]

    x, labels = torch.rand(4, 3, 4, 4, generator=generator()), torch.zeros(4, dtype=torch.long)
    assert torch.equal(autoattack(flat, x, labels, "linf", 0.1, batch=2, attacks=("apgd-ce", "apgd-t")), x)
    messages = [record.getMessage() for record in caplog.records]
    assert any("zero gradient" in message for message in messages)
    assert len(messages) == len(set(messages))


def test_without_the_package_autoattack_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ConfigError, match=r"pip install 'trivium\[eval\]'"):
        autoattack_module.require()
