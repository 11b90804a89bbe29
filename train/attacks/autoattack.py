"""AutoAttack (Croce and Hein 2020) through the package pyautoattack."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trivium.runtime.errors import ConfigError

from .ball import Norm
from .losses import Logits

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
TARGETS = 9
"""Wrong classes that each targeted attack tries, at most."""


class Callback(nn.Module):
    """A function of pictures as a module, which is what the package takes."""

    def __init__(self, function: Logits) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Once(logging.Filter):
    """Lets a message through the first time; the package repeats its warnings for every batch and target."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        new = record.getMessage() not in self.seen
        self.seen.add(record.getMessage())
        return new


def require() -> None:
    """Raises: ConfigError where pyautoattack is not installed."""
    try:
        import pyautoattack  # noqa: F401
    except ImportError:
        raise ConfigError("AutoAttack needs the package pyautoattack: pip install 'trivium[eval]'") from None


def autoattack(
    logits: Logits,
    x: Tensor,
    labels: Tensor,
    norm: Norm,
    eps: float,
    seed: int = 0,
    batch: int = 64,
    attacks: Sequence[str] | None = None,
) -> Tensor:
    """The standard version: APGD-CE, targeted APGD with the DLR loss, targeted FAB, Square with 5,000 queries, each on
    the pictures that all before it left right.

    With fewer than 10 classes the targeted attacks try all wrong ones; with fewer than 4, for which the targeted DLR
    loss is not defined, targeted APGD is left out.

    Args:
        logits: deterministic, of pictures in [0, 1].
        x: pictures [B, 3, H, W] in [0, 1].
        attacks: some of STANDARD instead of all.

    Returns: pictures like x: wrongly answered ones where any attack found one, else as they were.

    Raises: ConfigError where pyautoattack is not installed.
    """
    require()
    from pyautoattack import AutoAttack

    if len(x) == 0 or eps == 0:
        return x.clone()
    with torch.no_grad():
        classes = logits(x[:1]).shape[1]
    chosen = [name for name in attacks or STANDARD if name != "apgd-t" or classes >= 4]
    tracer, once, logger = sys.gettrace(), Once(), logging.getLogger("auto-attack")
    logger.addFilter(once)
    # the package seeds torch's global generators
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        adversary = AutoAttack(
            Callback(logits),
            norm={"linf": "Linf", "l2": "L2"}[norm],
            eps=eps,
            version="standard",
            seed=seed,
            device=x.device,
        )
        adversary.attacks_to_run = chosen
        adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = min(TARGETS, classes - 1)
        try:
            found, _ = adversary.run_standard_evaluation(x, labels, batch_size=batch)
        finally:
            sys.settrace(tracer)  # its check for gradients within the model leaves none
            logger.removeFilter(once)
    result: Tensor = found
    return result
