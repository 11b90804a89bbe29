"""Torch models observed and calibrated from end to end, on scikit-learn's digits: small, real, and always there."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trivium.kernels import dropout_masks, mc_heads_ref
from trivium.runtime.bundle import Dropout, Preprocessing
from trivium.runtime.errors import ConfigError
from trivium.runtime.router import routers
from trivium.train.calibration import calibrate
from trivium.train.calibration.comparison import provisional
from trivium.train.calibration.observe import Observer
from trivium.train.data.pictures import DataSpec, Pictures, load_pictures
from trivium.train.models.backbone import create, split
from trivium.train.models.student import Student
from trivium.train.sections import CalibrationSpec

PREPROCESSING = Preprocessing(height=8, width=8, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
DROPOUT = Dropout(rate=0.5, passes=16, seed=3)
SIZE = 64


class Ridge(nn.Module):
    """Random ReLU features and one ridge regression a head, on pictures as they are or with their levels pressed."""

    head_names: tuple[str, ...] = ("clean", "robust", "combined")
    dropout_rate = 0.5

    def __init__(self, pictures: Pictures) -> None:
        super().__init__()
        x = (pictures.batch(range(len(pictures))).float() / 255 - 0.5) / 0.25
        self.mix = nn.Parameter(torch.randn(192, 256, generator=torch.Generator().manual_seed(0)) / 14)
        hard = x * 0.3 + 0.8 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        target = torch.eye(10)[torch.from_numpy(pictures.labels)] - 0.1
        weights = []
        for views in ([x], [hard], [x, hard]):
            h = torch.cat([self.features(view) for view in views])
            y = torch.cat([target] * len(views))
            weights.append(12 * torch.linalg.solve(h.T @ h + 5 * torch.eye(256), h.T @ y).T)
        self.heads = nn.Parameter(torch.stack(weights))

    def features(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.mix).relu().detach()

    def head_weights(self) -> tuple[Tensor, Tensor]:
        return self.heads, torch.zeros(3, 10)

    def original_logits(self, x: Tensor) -> Tensor:
        return self.features(x) @ self.heads[0].T


@pytest.fixture(scope="module")
def model() -> Ridge:
    return Ridge(load_pictures(DataSpec(kind="digits"), "train", PREPROCESSING))


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    return load_pictures(DataSpec(kind="digits"), "calibration", PREPROCESSING)


def images_of(pictures: Pictures, count: int) -> np.ndarray:
    return pictures.batch(range(count)).permute(0, 2, 3, 1).contiguous().numpy()


def test_observer_agrees_with_the_definition(model: Ridge, pictures: Pictures) -> None:
    observer = Observer(model, PREPROCESSING, DROPOUT)
    images = images_of(pictures, 70)
    features, original = observer.look(images)
    x = torch.from_numpy((images / 255 - 0.5) / 0.25).float().permute(0, 3, 1, 2)
    with torch.no_grad():
        assert features == pytest.approx(model.features(x).numpy(), abs=1e-4)
        assert original == pytest.approx(model.original_logits(x).softmax(1).numpy(), abs=1e-4)
    assert observer.original(images) == pytest.approx(original, abs=1e-6)
    tau = [0.7, 1.0, 1.5]
    masks = dropout_masks(DROPOUT.passes, 256, 0.5, DROPOUT.seed)
    weights = model.heads.detach().numpy()
    expected = mc_heads_ref(features, weights, np.zeros((3, 10)), tau, masks, 0.5)
    for found, wanted in zip(observer.statistics(features, tau), expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-4)
    logits = observer.pass_logits(features, 2) / tau[2]
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    assert p.mean(1) == pytest.approx(expected.probabilities[:, 2], abs=1e-4)


@pytest.mark.parametrize(("depth", "tail"), [(0, "copied"), (1, "copied"), (1, "shared")])
def test_a_student_is_run_through_its_trunk_once(depth: int, tail: str) -> None:
    torch.manual_seed(0)
    original = split(create("resnet10t", 5), 32, 32)
    student = Student(original, ["a", "b"], depth, tail, 0.5).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in student.branches.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.01)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    size = Preprocessing(height=32, width=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    features, probabilities = Observer(student, size, DROPOUT).look(images)
    x = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        assert features == pytest.approx(student.features(x).numpy(), abs=1e-4)
        assert probabilities == pytest.approx(student.original_logits(x).softmax(1).numpy(), abs=1e-5)


def test_calibration_from_end_to_end(model: Ridge, pictures: Pictures) -> None:
    seen: list[tuple[int, int]] = []
    settings, record = calibrate.calibrate(model, pictures, DROPOUT, limit=120, progress=lambda *at: seen.append(at))
    assert seen[-1] == (120, 120)
    assert settings.paper is not None
    assert settings.blend is not None
    assert record.pictures == 120
    assert set(record.mixture) == {"clean", *calibrate.KINDS}
    assert sum(record.mixture.values()) == pytest.approx(1, abs=1e-5)
    assert set(record.temperature) == {"clean", "robust", "combined"}
    trial = provisional(pictures.classes, model.head_names, PREPROCESSING, DROPOUT, settings)
    assert {row["router"] for row in record.routers if not row["control"]} == set(routers(trial))
    assert sum(row["control"] for row in record.routers) == 3
    assert settings.gate is not None
    assert settings.default in routers(trial)
    assert "scikit-learn" in record.data
    again = calibrate.calibrate(model, pictures, DROPOUT, limit=120)
    assert (settings, record) == again
    other = calibrate.calibrate(model, pictures, DROPOUT, limit=120, seed=1)
    assert other[1].temperature != record.temperature


def test_temperatures_lower_the_likelihood_loss(model: Ridge, pictures: Pictures) -> None:
    _, record = calibrate.calibrate(model, pictures, DROPOUT)
    observer = Observer(model, PREPROCESSING, DROPOUT)
    features, _ = observer.look(images_of(pictures, len(pictures)))

    def loss(tau: float) -> float:
        p = observer.statistics(features, [tau, 1, 1]).probabilities[:, 0]
        return float(-np.log(p[np.arange(len(p)), pictures.labels]).mean())

    assert loss(record.temperature["clean"]) < loss(1.0)
    _, plain = calibrate.calibrate(model, pictures, DROPOUT, limit=60, spec=CalibrationSpec(temperatures=False))
    assert set(plain.temperature.values()) == {1.0}


def test_a_router_asked_for_is_taken_and_said_so(model: Ridge, pictures: Pictures) -> None:
    settings, record = calibrate.calibrate(model, pictures, DROPOUT, limit=60, router="paper")
    assert settings.default == "paper"
    assert record.chosen_because.startswith("asked for; the comparison would have taken")
    with pytest.raises(ConfigError, match="no router 'best'; this model has: clean, robust, combined, mean"):
        calibrate.calibrate(model, pictures, DROPOUT, limit=60, router="best")


def test_a_single_head_is_calibrated_without_rules(model: Ridge, pictures: Pictures) -> None:
    class Single(Ridge):
        head_names: tuple[str, ...] = ("original",)

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.mix, self.heads = model.mix, model.heads

        def head_weights(self) -> tuple[Tensor, Tensor]:
            return self.heads[:1], torch.zeros(1, 10)

    settings, record = calibrate.calibrate(Single(), pictures, DROPOUT, limit=60)
    assert settings.model_dump(exclude_none=True) == {"default": "original"}
    assert [row["router"] for row in record.routers] == ["original"]
    assert record.chosen_because == "the only router of this model"


def test_too_few_pictures_are_refused(model: Ridge, pictures: Pictures) -> None:
    with pytest.raises(ConfigError, match="at least 30 pictures, there are 10"):
        calibrate.calibrate(model, pictures, DROPOUT, limit=10)


def test_shifted_views_are_drawn_by_seed(pictures: Pictures) -> None:
    images = images_of(pictures, 60)
    found = calibrate.shifted(images, np.arange(60), 0)
    assert found.shape == images.shape
    assert (found == calibrate.shifted(images, np.arange(60), 0)).all()
    assert (found != calibrate.shifted(images, np.arange(60), 1)).any()
    changed = (found != images).any((1, 2, 3))
    # saturate leaves some grey pictures as they are
    assert changed.mean() > 0.8
