"""Two-winged networks of TWINS (Liu et al. 2023): one set of convolutions, two wings of batch norms.

In training the first half of a batch goes through the frozen wing, normalised with the statistics of pre-training, and
the rest through the adaptive wing, normalised with its own; everything but the batch norms sees one batch. In
evaluation, and so under attack, all of a batch goes through the adaptive wing and its running statistics.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trivium.runtime.errors import ConfigError


class TwinNorm(nn.Module):
    """Two batch norms in the place of one, with whatever activation and dropout it brought along.

    Args:
        norm: taken over as the adaptive wing; the other one starts as its copy.
        shared_affine: both wings learn one scale and one shift; else each its own, as the authors' code does.
        freeze: the first wing keeps the statistics it starts with. False is a control: two adaptive wings.
    """

    def __init__(self, norm: _BatchNorm, shared_affine: bool = False, freeze: bool = True) -> None:
        super().__init__()
        self.adaptive, self.first, self.freeze = norm, copy.deepcopy(norm), freeze
        if shared_affine:
            self.first.weight, self.first.bias = norm.weight, norm.bias
        self.train(norm.training)

    def train(self, mode: bool = True) -> TwinNorm:
        """As nn.Module's; a frozen wing goes on normalising with the statistics it has, its dropout follows `mode`."""
        super().train(mode)
        if self.freeze:
            self.first.training = False
        return self

    def forward(self, x: Tensor) -> Tensor:
        half = len(x) // 2
        if not self.training or half == 0:
            adapted: Tensor = self.adaptive(x)
            return adapted
        return torch.cat([self.first(x[:half]), self.adaptive(x[half:])])


def spread_wings(model: nn.Module, shared_affine: bool = False, freeze: bool = True) -> None:
    """Give every batch norm of a network a second wing, in place (see TwinNorm).

    Logits [B, C] of the network in training mode are then those of the first wing for the first B // 2 pictures and
    those of the adaptive wing for the others.

    Raises: ConfigError where there is no batch norm, or one that keeps no statistics.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        raise ConfigError("two wings differ in their batch norms, and what is trained here has none")
    if any(norm.running_mean is None for norm in norms):
        raise ConfigError("a batch norm keeps no running statistics, so there are none for a wing to freeze")
    _replace(model, {norm: TwinNorm(norm, shared_affine, freeze) for norm in norms})


def fold_wings(model: nn.Module) -> None:
    """Leave only the adaptive wing, in place: an ordinary network with the same outputs in evaluation."""
    _replace(model, {module: module.adaptive for module in twin_norms(model)})


def twin_norms(model: nn.Module) -> Iterator[TwinNorm]:
    """The two-winged norms of a network."""
    return (module for module in model.modules() if isinstance(module, TwinNorm))


def _replace(model: nn.Module, others: dict[nn.Module, nn.Module]) -> None:
    # A module may stand in several places (the parts of a Classifier share theirs), so all places are visited.
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in others:
                setattr(parent, name, others[child])
