"""Gradient attacks: ball and range, best iterate, the optimum of a linear model, APGD's schedule in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trivium.train.attacks.ball import project, random_point
from trivium.train.attacks.pgd import cross_entropy, pgd

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


def far(x: Tensor, y: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm((x - y).flatten(1), ord=torch.inf if norm == "linf" else 2, dim=1)


norms = st.sampled_from(["linf", "l2"])


@settings(max_examples=40, deadline=None)
@given(norm=norms, eps=st.floats(0, 3), step=st.floats(0, 5), seed=st.integers(0, 99), start=st.booleans())
def test_pgd_stays_in_ball_and_range(norm, eps, step, seed, start):
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


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_returns_the_best_iterate_and_more_steps_are_never_worse(norm):
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


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_without_best_returns_the_last_iterate_with_one_pass_less(norm):
    x, labels = some_pictures(3)
    model = Bumpy(5)
    last = pgd(model, x, labels, norm, 0.5, 0.3, 4, generator=seeded(1), keep_best=False)
    assert len(model.asked) == 4
    longer = Bumpy(5)
    pgd(longer, x, labels, norm, 0.5, 0.3, 4, generator=seeded(1))
    assert len(longer.asked) == 5
    assert torch.equal(longer.asked[-1], last)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_finds_the_optimum_of_a_linear_model(norm):
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


def test_pgd_is_deterministic_by_its_generator_and_takes_a_radius_and_a_step_for_each_picture():
    x, labels = some_pictures(7)
    eps = torch.linspace(0, 0.5, len(x))
    one, two, other = (pgd(Bumpy(1), x, labels, "linf", eps, eps / 4, 5, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert (far(one, x, "linf") <= eps + SLACK).all()
    assert torch.equal(one[0], x[0])


def test_pgd_stops_at_the_first_wrong_answer_and_asks_no_more_about_it():
    x, labels = some_pictures(11, 32)
    model = Bumpy(2)
    out = pgd(model, x, labels, "linf", 0.3, 0.05, 10, generator=seeded(0), stop_early=True)
    sizes = [len(each) for each in model.asked]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]
    wrong = model(out).argmax(1) != labels
    thorough = pgd(model, x, labels, "linf", 0.3, 0.05, 10, generator=seeded(0))
    assert (wrong >= (model(thorough).argmax(1) != labels)).all()


def test_pgd_leaves_no_gradient_on_parameters_and_works_where_gradients_are_off():
    layer = torch.nn.Linear(48, 4)
    x, labels = some_pictures(1)
    with torch.no_grad():
        out = pgd(lambda p: layer(p.flatten(1)), x, labels, "linf", 0.1, 0.05, 2, random_start=False)
    assert layer.weight.grad is None
    assert not torch.equal(out, x)


def test_pgd_refuses_what_is_negative():
    x, labels = some_pictures(1)
    for eps, step, steps in ((-0.1, 0.1, 1), (0.1, -0.1, 1), (0.1, 0.1, -1)):
        with pytest.raises(ValueError, match="negative"):
            pgd(Bumpy(1), x, labels, "linf", eps, step, steps)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_points_fill_the_ball(norm):
    center = torch.full((2000, 3), 0.5)
    distance = far(random_point(center, norm, 0.1, seeded(0)), center, norm)
    # of a ball in three dimensions, half of the volume lies within 0.5 ** (1 / 3) of the radius
    assert abs((distance < 0.1 * 0.5 ** (1 / 3)).float().mean() - 0.5) < 0.04


def test_projection_is_idempotent_and_leaves_inner_points_alone():
    x, _ = some_pictures(2)
    inner = (x + 0.01).clamp(0, 1)
    for norm in ("linf", "l2"):
        torch.testing.assert_close(project(inner, x, norm, 0.5), inner)
        outer = project(x + 1, x, norm, 0.2)
        torch.testing.assert_close(project(outer, x, norm, 0.2), outer)
