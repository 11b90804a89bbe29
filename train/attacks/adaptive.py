"""An attack made for a routed system: several losses through the soft router and on all heads, the best of each."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .apgd import apgd
from .ball import Norm
from .losses import Loss, cross_entropy, dlr, margin, wrong_answer
from .pgd import pgd
from .system import System


def adaptive(
    system: System,
    router: str,
    x: Tensor,
    labels: Tensor,
    norm: Norm,
    eps: float,
    steps: int = 50,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Make the routed answer wrong by whichever way does it.

    The routed answer's cross-entropy by PGD and APGD, its DLR, the mean cross-entropy of all heads, the margin of the
    head that holds out best, and each head's cross-entropy alone, by APGD; each is tried on the pictures that all
    before it left right. This is the kind of attack that Tramèr et al. (2020) ask for: it knows the masks, the
    temperatures and the rule.

    Args:
        x: pictures [B, 3, H, W] in [0, 1].
        steps: of each attempt.

    Returns: pictures like x: wrongly answered ones where any attempt found one.
    """
    found = x.clone()
    rows = torch.arange(len(x), device=x.device)

    def answers(pictures: Tensor) -> Tensor:
        return system.answers(pictures, router)

    for number, loss in enumerate(attempts(system)):
        for by_pgd in (True, False) if number == 0 else (False,):
            if len(rows) == 0:
                return found
            if by_pgd:
                out = pgd(
                    answers, x[rows], labels[rows], norm, eps, eps / 4, steps,
                    generator=generator, loss=loss, stop_early=True, wrong=routed_wrong,
                )  # fmt: skip
            else:
                out = apgd(
                    answers, x[rows], labels[rows], norm, eps, steps,
                    generator=generator, loss=loss, stop_early=True, wrong=routed_wrong,
                )  # fmt: skip
            with torch.no_grad():
                fooled = routed_wrong(answers(out), labels[rows])
            found[rows[fooled]] = out[fooled]
            rows = rows[~fooled]
    return found


def routed_wrong(answers: Tensor, labels: Tensor) -> Tensor:
    """[B]: whether the routed one of System.answers [B, 1 + K, C] is wrong."""
    return wrong_answer(answers[:, 0], labels)


def attempts(system: System) -> Iterator[Loss]:
    """Losses of System.answers [B, 1 + K, C], the most promising first."""
    heads = range(1, 1 + len(system.heads))
    yield lambda z, labels: cross_entropy(z[:, 0], labels)
    yield lambda z, labels: dlr(z[:, 0], labels)
    if len(heads) > 1:
        yield lambda z, labels: torch.stack([cross_entropy(z[:, k], labels) for k in heads]).mean(0)
        yield lambda z, labels: torch.stack([margin(z[:, k], labels) for k in heads]).amin(0)
        for k in heads:
            yield lambda z, labels, k=k: cross_entropy(z[:, k], labels)  # type: ignore[misc]
