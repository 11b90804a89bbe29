"""Gradient attacks: ball and range, best iterate, the optimum of a linear model, APGD's schedule in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trivium.train.attacks.apgd import apgd, checkpoints
from trivium.train.attacks.ball import Norm, project, random_point
from trivium.train.attacks.losses import cross_entropy, dlr, margin
from trivium.train.attacks.pgd import pgd

SLACK = 1e-6
"""Rounding of float32 around 1."""


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Bumpy:
    """A small smooth classifier with many local optima, and a record of what it was asked."""

    def __init__(self, seed: int, classes: int = 4, shape: tuple[int, ...] = (3, 4, 4)) -> None:
        size = int(torch.tensor(shape).prod())
        self.first = torch.randn(size, 16, generator=seeded(seed)) * 2
        self.second = torch.randn(16, classes, generator=seeded(seed + 1)) * 2
        self.asked: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.asked.append(x.detach().clone())
        return torch.sin(x.flatten(1) @ self.first.to(x.dtype)) @ self.second.to(x.dtype)


def some_pictures(seed: int, count: int = 6) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 3, 4, 4, generator=seeded(seed))
    x[0] = x[0].round()  # a picture on the edge of the range
    return x, torch.randint(4, (count,), generator=seeded(seed))


def far(x: Tensor, y: Tensor, norm: Norm) -> Tensor:
    return torch.linalg.vector_norm((x - y).flatten(1), ord=torch.inf if norm == "linf" else 2, dim=1)


norms = st.sampled_from(["linf", "l2"])
both_norms = pytest.mark.parametrize("norm", ["linf", "l2"])


@settings(max_examples=40, deadline=None)
@given(norm=norms, eps=st.floats(0, 3), step=st.floats(0, 5), seed=st.integers(0, 99), start=st.booleans())
def test_pgd_stays_in_ball_and_range(norm: Norm, eps: float, step: float, seed: int, start: bool) -> None:
    x, labels = some_pictures(seed)
    model = Bumpy(seed)
    kept = x.clone()
    out = pgd(model, x, labels, norm, eps, step, 3, random_start=start, generator=seeded(seed))
    for point in (out, *model.asked):
        assert point.min() >= 0
        assert point.max() <= 1
        assert (far(point, x, norm) <= eps + SLACK * (1 + eps)).all()
    assert not out.requires_grad
    assert torch.equal(x, kept)


@both_norms
def test_pgd_returns_the_best_iterate_and_more_steps_are_never_worse(norm: Norm) -> None:
    x, labels = some_pictures(3)
    before = torch.full((len(x),), -torch.inf)
    for steps in range(8):
        model = Bumpy(5)
        out = pgd(model, x, labels, norm, 0.5, 0.3, steps, generator=seeded(1))
        seen = torch.stack([cross_entropy(model(point), labels) for point in list(model.asked)])
        value = cross_entropy(model(out), labels)
        assert torch.equal(value, seen.max(0).values)
        assert (value >= before).all()
        before = value


@both_norms
def test_pgd_without_best_returns_the_last_iterate_with_one_pass_less(norm: Norm) -> None:
    x, labels = some_pictures(3)
    model = Bumpy(5)
    last = pgd(model, x, labels, norm, 0.5, 0.3, 4, generator=seeded(1), keep_best=False)
    assert len(model.asked) == 4
    longer = Bumpy(5)
    pgd(longer, x, labels, norm, 0.5, 0.3, 4, generator=seeded(1))
    assert len(longer.asked) == 5
    assert torch.equal(longer.asked[-1], last)


@both_norms
def test_pgd_finds_the_optimum_of_a_linear_model(norm: Norm) -> None:
    """For two classes the loss falls with the margin w.x alone, whose least value in the ball has a closed form."""
    w = torch.randn(48, generator=seeded(0))
    x = 0.5 + 0.01 * torch.randn(5, 3, 4, 4, generator=seeded(1))
    labels = torch.tensor([0, 1, 0, 1, 0])

    def margin(pictures: Tensor) -> Tensor:
        return pictures.flatten(1) @ w

    out = pgd(lambda p: torch.stack([margin(p), -margin(p)], 1), x, labels, norm, 0.2, 0.05, 40, generator=seeded(2))
    sign = 1 - 2 * labels
    least = sign * margin(x) - 0.2 * (w.abs().sum() if norm == "linf" else w.norm())
    torch.testing.assert_close(sign * margin(out), least, rtol=1e-4, atol=1e-4)


def test_pgd_is_deterministic_by_its_generator_and_takes_a_radius_and_a_step_for_each_picture() -> None:
    x, labels = some_pictures(7)
    eps = torch.linspace(0, 0.5, len(x))
    one, two, other = (pgd(Bumpy(1), x, labels, "linf", eps, eps / 4, 5, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert (far(one, x, "linf") <= eps + SLACK).all()
    assert torch.equal(one[0], x[0])


def test_pgd_stops_at_the_first_wrong_answer_and_asks_no_more_about_it() -> None:
    x, labels = some_pictures(11, 32)
    model = Bumpy(2)
    out = pgd(model, x, labels, "linf", 0.3, 0.05, 10, generator=seeded(0), stop_early=True)
    sizes = [len(each) for each in model.asked]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]
    wrong = model(out).argmax(1) != labels
    thorough = pgd(model, x, labels, "linf", 0.3, 0.05, 10, generator=seeded(0))
    assert (wrong >= (model(thorough).argmax(1) != labels)).all()


def test_pgd_leaves_no_gradient_on_parameters_and_works_where_gradients_are_off() -> None:
    layer = torch.nn.Linear(48, 4)
    x, labels = some_pictures(1)
    with torch.no_grad():
        out = pgd(lambda p: layer(p.flatten(1)), x, labels, "linf", 0.1, 0.05, 2, random_start=False)
    assert layer.weight.grad is None
    assert not torch.equal(out, x)


def test_pgd_refuses_what_is_negative() -> None:
    x, labels = some_pictures(1)
    for eps, step, steps in ((-0.1, 0.1, 1), (0.1, -0.1, 1), (0.1, 0.1, -1)):
        with pytest.raises(ValueError, match="negative"):
            pgd(Bumpy(1), x, labels, "linf", eps, step, steps)


@both_norms
def test_random_points_fill_the_ball(norm: Norm) -> None:
    center = torch.full((2000, 3), 0.5)
    distance = far(random_point(center, norm, 0.1, seeded(0)), center, norm)
    # of a ball in three dimensions, half of the volume lies within 0.5 ** (1 / 3) of the radius
    assert abs((distance < 0.1 * 0.5 ** (1 / 3)).float().mean() - 0.5) < 0.04


def test_projection_is_idempotent_and_leaves_inner_points_alone() -> None:
    x, _ = some_pictures(2)
    inner = (x + 0.01).clamp(0, 1)
    for norm in ("linf", "l2"):
        torch.testing.assert_close(project(inner, x, norm, 0.5), inner)
        outer = project(x + 1, x, norm, 0.2)
        torch.testing.assert_close(project(outer, x, norm, 0.2), outer)


@settings(max_examples=30, deadline=None)
@given(norm=norms, eps=st.floats(0, 3), seed=st.integers(0, 99), steps=st.integers(0, 12), stop=st.booleans())
def test_apgd_stays_in_ball_and_range(norm: Norm, eps: float, seed: int, steps: int, stop: bool) -> None:
    x, labels = some_pictures(seed)
    model = Bumpy(seed)
    out = apgd(model, x, labels, norm, eps, steps, 2, seeded(seed), stop_early=stop)
    for point in (out, *([] if stop else model.asked)):
        assert point.min() >= 0
        assert point.max() <= 1
        assert (far(point, x, norm) <= eps + SLACK * (1 + eps)).all()


@both_norms
def test_apgd_returns_the_best_of_all_it_saw_over_its_restarts(norm: Norm) -> None:
    x, labels = some_pictures(3)
    model = Bumpy(5)
    out = apgd(model, x, labels, norm, 0.5, 15, 3, seeded(1))
    assert len(model.asked) == 3 * 16
    seen = torch.stack([cross_entropy(model(point), labels) for point in list(model.asked)])
    torch.testing.assert_close(cross_entropy(model(out), labels), seen.max(0).values, rtol=0, atol=1e-6)
    once = apgd(Bumpy(5), x, labels, norm, 0.5, 15, 1, seeded(1))
    assert (cross_entropy(model(out), labels) >= cross_entropy(model(once), labels) - 1e-6).all()


@both_norms
def test_apgd_agrees_with_its_algorithm_in_float64_picture_by_picture(norm: Norm) -> None:
    x, labels = some_pictures(4, 5)
    x, eps, steps = x.double(), torch.linspace(0.05, 0.6, 5, dtype=torch.float64), 40
    model = Bumpy(9)
    out = apgd(model, x, labels, norm, eps, steps, 1, seeded(3))
    asked = torch.stack(model.asked).flatten(2).numpy()
    halvings = 0
    for i in range(len(x)):
        points, best, halved = plain_apgd(Bumpy(9), x[i].flatten().numpy(), int(labels[i]), norm, float(eps[i]),
                                          asked[0, i], steps)  # fmt: skip
        np.testing.assert_allclose(asked[:, i], points, rtol=0, atol=1e-9)
        np.testing.assert_allclose(out[i].flatten().numpy(), best, rtol=0, atol=1e-9)
        halvings += halved
    assert halvings > len(x)


def plain_apgd(
    model: Bumpy, x: np.ndarray, label: int, norm: Norm, eps: float, start: np.ndarray, steps: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Algorithm 1 of Croce and Hein 2020 for one picture: (all points [steps + 1, D], the best one, halvings)."""

    def loss_and_gradient(point: np.ndarray) -> tuple[float, np.ndarray]:
        leaf = torch.tensor(point, requires_grad=True)
        z = model(leaf.reshape(1, 3, 4, 4))
        value = torch.logsumexp(z, 1)[0] - z[0, label]
        value.backward()
        assert leaf.grad is not None
        return value.item(), leaf.grad.numpy()

    def inside(point: np.ndarray) -> np.ndarray:
        delta = point - x
        if norm == "linf":
            delta = np.clip(delta, -eps, eps)
        elif np.sqrt((delta**2).sum()) > eps:
            delta = delta * eps / np.sqrt((delta**2).sum())
        return np.clip(x + delta, 0, 1)

    def along(gradient: np.ndarray) -> np.ndarray:
        return np.sign(gradient) if norm == "linf" else gradient / np.sqrt((gradient**2).sum())

    p = [0.0, 0.22]
    while p[-1] < 1:
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    judged = [math.ceil(share * steps - 1e-9) for share in p if share <= 1]
    points, eta, halved = [start], 2 * eps, 0
    losses = [loss_and_gradient(start)[0]]
    current, previous, current_loss = start, start, losses[0]
    best, best_loss = start, losses[0]
    rises, at_checkpoint = 0, [(eta, best_loss)]
    for k in range(steps):
        step = inside(current + eta * along(loss_and_gradient(current)[1]))
        if k > 0:
            step = inside(current + 0.75 * (step - current) + 0.25 * (current - previous))
        previous, current = current, step
        value = loss_and_gradient(current)[0]
        points.append(current)
        rises += value > current_loss
        current_loss = value
        if value > best_loss:
            best, best_loss = current, value
        if k + 1 in judged:
            place = judged.index(k + 1)
            before = at_checkpoint[-1]
            unchanged = before == (eta, best_loss)
            at_checkpoint.append((eta, best_loss))
            if rises < 0.75 * (judged[place] - judged[place - 1]) or unchanged:
                eta, halved = eta / 2, halved + 1
                current, current_loss = best, best_loss
            rises = 0
    return np.array(points), best, halved


def test_checkpoints_are_those_of_the_paper() -> None:
    assert checkpoints(100) == [0, 22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(20) == [0, 5, 9, 12, 14, 16, 18, 19, 20]
    assert checkpoints(0) == [0]


@both_norms
def test_apgd_finds_the_optimum_of_a_linear_model(norm: Norm) -> None:
    w = torch.randn(48, generator=seeded(0))
    x = 0.5 + 0.01 * torch.randn(5, 3, 4, 4, generator=seeded(1))
    labels = torch.tensor([0, 1, 0, 1, 0])
    out = apgd(lambda p: torch.stack([p.flatten(1) @ w, -(p.flatten(1) @ w)], 1), x, labels, norm, 0.2, 100)
    sign = 1 - 2 * labels
    least = sign * (x.flatten(1) @ w) - 0.2 * (w.abs().sum() if norm == "linf" else w.norm())
    torch.testing.assert_close(sign * (out.flatten(1) @ w), least, rtol=1e-4, atol=1e-4)


def test_apgd_needs_no_step_size_where_a_bad_one_lets_pgd_down() -> None:
    x, labels = some_pictures(6, 40)
    model = Bumpy(4)
    found = cross_entropy(model(apgd(model, x, labels, "linf", 0.3, 40, 1, seeded(0))), labels)
    clumsy = cross_entropy(model(pgd(model, x, labels, "linf", 0.3, 0.6, 40, generator=seeded(0))), labels)
    assert found.mean() > clumsy.mean()


def test_apgd_leaves_alone_what_is_fooled() -> None:
    x, labels = some_pictures(11, 32)
    model = Bumpy(2)
    out = apgd(model, x, labels, "linf", 0.3, 20, 2, seeded(0), stop_early=True)
    sizes = [len(each) for each in model.asked]
    assert sizes[:21] == sorted(sizes[:21], reverse=True)
    assert sizes[-1] < sizes[0]
    wrong = model(out).argmax(1) != labels
    thorough = model(apgd(model, x, labels, "linf", 0.3, 20, 1, seeded(0))).argmax(1) != labels
    assert wrong.sum() >= thorough.sum()


def test_margin_and_dlr() -> None:
    z = torch.tensor([[3.0, 1.0, 0.0, -1.0], [1.0, 4.0, 2.0, 0.0]])
    labels = torch.tensor([0, 2])
    assert margin(z, labels).tolist() == [-2, 2]
    torch.testing.assert_close(dlr(z, labels), torch.tensor([-2 / 3, 2 / 3]))
    torch.testing.assert_close(dlr(100 * z, labels), dlr(z, labels))
    assert dlr(z[:, :2], torch.tensor([0, 0])).tolist() == [-2, 3]
