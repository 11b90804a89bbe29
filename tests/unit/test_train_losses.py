"""Losses against their equations recomputed in NumPy float64."""

import math

import numpy as np
import pytest
import torch

from trivium.train.methods import losses

RNG = np.random.default_rng(0)
B, C, T = 7, 5, 6
LOGITS, ORIGINAL, TEACHER, SHIFTED = (RNG.normal(size=(B, C)) * 3 for _ in range(4))
LABELS = RNG.integers(0, C, B)
WEIGHT = RNG.random(B)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def cross_entropy(z: np.ndarray) -> float:
    return float(-np.log(softmax(z)[np.arange(B), LABELS]).mean())


def kl(a: np.ndarray, b: np.ndarray, tau: float) -> np.ndarray:
    p, q = softmax(a / tau), softmax(b / tau)
    return tau**2 * (p * np.log(p / q)).sum(-1)


def t(a: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(a))


@pytest.mark.parametrize("tau", [1.0, 2.0, 4.0])
def test_clean_loss(tau):
    wanted = cross_entropy(LOGITS) + 0.7 * kl(ORIGINAL, LOGITS, tau).mean()
    assert losses.clean_loss(t(LOGITS), t(LABELS), t(ORIGINAL), tau, 0.7).item() == pytest.approx(wanted, rel=1e-12)


def test_robust_loss_weighs_the_teacher_picture_by_picture():
    wanted = cross_entropy(LOGITS) + 0.7 * (WEIGHT * kl(TEACHER, LOGITS, 2)).mean()
    got = losses.robust_loss(t(LOGITS), t(LABELS), t(TEACHER), t(WEIGHT), 2.0, 0.7)
    assert got.item() == pytest.approx(wanted, rel=1e-12)
    alone = losses.robust_loss(t(LOGITS), t(LABELS), None, None, 2.0, 0.7)
    assert alone.item() == pytest.approx(cross_entropy(LOGITS), rel=1e-12)


def test_combined_loss():
    wanted = (cross_entropy(LOGITS) + cross_entropy(SHIFTED)) / 2
    wanted += 0.6 / 2 * (kl(ORIGINAL, LOGITS, 2).mean() + (WEIGHT * kl(TEACHER, SHIFTED, 2)).mean())
    got = losses.combined_loss(t(LOGITS), t(SHIFTED), t(LABELS), t(ORIGINAL), t(TEACHER), t(WEIGHT), tau=2.0, gamma=0.6)
    assert got.item() == pytest.approx(wanted, rel=1e-12)


def test_no_gradient_reaches_the_targets():
    student, original = t(LOGITS).requires_grad_(), t(ORIGINAL).requires_grad_()
    losses.clean_loss(student, t(LABELS), original, 2.0, 1.0).backward()
    assert original.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


def test_uncertainty_weights():
    passes = RNG.normal(size=(T, B, C)) * 2
    p = softmax(passes)
    mean = p.mean(0)
    entropy = -(mean * np.log(mean)).sum(-1)
    information = entropy + (p * np.log(p)).sum(-1).mean(0)
    by_entropy = losses.uncertainty_weight(t(passes), "entropy").numpy()
    by_information = losses.uncertainty_weight(t(passes), "mutual_information").numpy()
    np.testing.assert_allclose(by_entropy, 1 - entropy / math.log(C), rtol=1e-5)
    np.testing.assert_allclose(by_information, np.exp(-information), rtol=1e-5)
    np.testing.assert_array_equal(losses.uncertainty_weight(t(passes), "none").numpy(), 1)


def test_uncertainty_weights_at_the_ends():
    uniform, sure = torch.zeros(1, 2, C), torch.eye(C)[None, :2] * 200
    torch.testing.assert_close(losses.uncertainty_weight(uniform, "entropy"), torch.zeros(2))
    torch.testing.assert_close(losses.uncertainty_weight(sure, "entropy"), torch.ones(2))


def test_jensen_shannon():
    views = [LOGITS, SHIFTED, TEACHER]
    p = np.stack([softmax(z) for z in views])
    mixture = p.mean(0)
    wanted = np.mean([(q * np.log(q / mixture)).sum(-1).mean() for q in p])
    assert losses.jensen_shannon([t(z) for z in views]).item() == pytest.approx(wanted, rel=1e-6)
    assert losses.jensen_shannon([t(LOGITS)] * 3).item() == pytest.approx(0, abs=1e-6)
