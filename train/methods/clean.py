"""Clean training: what the original classifier is made by."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..loop import Loss
from ..sections import Model

if TYPE_CHECKING:
    from ..feed import Feed


def original_objective(feed: Feed, model: nn.Module, settings: Model) -> Loss:
    """Cross-entropy on clean views."""
    smoothing = settings.schedule.label_smoothing if settings.schedule else 0.0

    def loss(
        pictures: Tensor, indices: NDArray[np.int64], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        x = feed.normalise(feed.clean(pictures, generator))
        with feed.machine.autocast():
            logits = model(x)
        return F.cross_entropy(logits.float(), feed.labels(indices), label_smoothing=smoothing), {}

    return loss
