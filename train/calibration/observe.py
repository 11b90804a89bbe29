"""What a torch model says about pictures: features, Monte-Carlo-dropout statistics, and the original's answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from trivium.kernels import HeadStatistics, dropout_masks
from trivium.runtime.bundle import Dropout, Preprocessing

from ..models.mc import Heads, mc_statistics, normalise
from ..models.student import Student

BATCH = 64
"""Pictures a forward pass."""
CLEAN = "clean"
"""The kind of a view that was not corrupted."""


@dataclass(frozen=True)
class Observations:
    """What the heads said about N views of calibration pictures, clean ones and corrupted ones."""

    statistics: HeadStatistics
    labels: NDArray[np.int64]
    original: NDArray[np.int64] | None
    """[N]: the original classifier's answer to each view; None where there is no original."""
    kind: NDArray[np.str_]
    """[N]: "clean", or the name of the corruption or augmentation."""
    picture: NDArray[np.int64]
    """[N]: the picture of which this is a view."""

    @property
    def clean(self) -> NDArray[np.bool_]:
        return np.asarray(self.kind == CLEAN)

    def take(self, rows: ArrayLike) -> Observations:
        """Some of the views; rows is a mask [N] or indices."""
        chosen = np.asarray(rows)
        return Observations(
            HeadStatistics(*(column[chosen] for column in self.statistics)),
            self.labels[chosen],
            None if self.original is None else self.original[chosen],
            self.kind[chosen],
            self.picture[chosen],
        )


class Observer:
    """Runs a torch model on uint8 pictures the way its bundle will: same normalisation, masks and statistics.

    Args:
        model: is put into eval mode.
        preprocessing: for mean and std.
        dropout: rate, passes and seed of the masks.
    """

    def __init__(self, model: Heads, preprocessing: Preprocessing, dropout: Dropout) -> None:
        if isinstance(model, torch.nn.Module):
            model.eval()
        self.model = model
        self.heads = list(model.head_names)
        self.keep = 1.0 - dropout.rate
        self.weights, self.bias = (t.detach().float() for t in model.head_weights())
        self.masks = dropout_masks(dropout.passes, self.weights.shape[2], self.keep, dropout.seed)
        self._preprocessing = preprocessing

    def look(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Pictures uint8 [N, H, W, 3] -> (features [N, D] or [N, K, D], the original's probabilities [N, C])."""
        features, original = [], []
        with torch.inference_mode():
            for x in self._batches(images):
                own, logits = self._both(x)
                features.append(own.float().cpu().numpy())
                original.append(logits.float().softmax(1).cpu().numpy())
        return np.concatenate(features), np.concatenate(original)

    def original(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Pictures uint8 [N, H, W, 3] -> the original classifier's probabilities [N, C] alone."""
        with torch.inference_mode():
            found = [self.model.original_logits(x).float().softmax(1).cpu().numpy() for x in self._batches(images)]
        return np.concatenate(found)

    def statistics(self, features: NDArray[np.float32], temperature: Sequence[float]) -> HeadStatistics:
        """Features as `look` gives them, temperature [K] -> statistics, float32."""
        tensor = torch.from_numpy(features).to(self.weights.device)
        return mc_statistics(tensor, self.weights, self.bias, temperature, self.masks, self.keep)

    def pass_logits(self, features: NDArray[np.float32], head: int) -> NDArray[np.float32]:
        """One head's logits in every pass, not tempered: features as `look` gives them -> float32 [N, T, C]."""
        own = features if features.ndim == 2 else features[:, head]
        weights, bias = self.weights[head].cpu().numpy() / self.keep, self.bias[head].cpu().numpy()
        return np.stack([(own * mask) @ weights.T + bias for mask in self.masks.astype(np.float32)], axis=1)

    def _both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features and the original's logits; a student's frozen trunk, common to both, runs once."""
        if not isinstance(self.model, Student):
            return self.model.features(x), self.model.original_logits(x)
        z = self.model.trunk(x)
        branches = [self.model.branch(k, z) for k in range(max(1, len(self.model.branches)))]
        features = branches[0] if len(branches) == 1 else torch.stack(branches, 1)
        return features, self.model.original_from_trunk(z)

    def _batches(self, images: NDArray[np.uint8]) -> Iterator[Tensor]:
        for start in range(0, len(images), BATCH):
            batch = torch.from_numpy(np.ascontiguousarray(images[start : start + BATCH])).permute(0, 3, 1, 2)
            yield normalise(batch.to(self.weights.device), self._preprocessing)
