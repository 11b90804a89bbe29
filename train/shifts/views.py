"""What training makes of a batch: clean views (moved, mirrored) and shifted views (AugMix, PixMix, structural)."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from .augment import augmix, fractals, pixmix, structural

Share = Annotated[float, Field(ge=0, le=1)]


class ShiftSpec(BaseModel):
    """How shifted views are drawn: each picture takes one kind, by its share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    augmix: Share = 0.5
    pixmix: Share = 0.5
    structural: Share = 0.0
    severity: Annotated[float, Field(gt=0, le=10)] = 3
    """Of AugMix's and PixMix's operations."""
    width: Annotated[int, Field(ge=1)] = 3
    """AugMix's chains."""
    depth: Annotated[int, Field(ge=-1)] = -1
    """Operations a chain; -1 draws one to three."""
    alpha: Annotated[float, Field(gt=0)] = 1.0
    k: Annotated[int, Field(ge=0)] = 4
    """PixMix's most mixing rounds."""
    beta: Annotated[float, Field(gt=0)] = 3.0
    mixing_set: Annotated[int, Field(ge=1)] = 1000
    """Number of procedural fractals."""

    @model_validator(mode="after")
    def _shares(self) -> ShiftSpec:
        if abs(self.augmix + self.pixmix + self.structural - 1) > 1e-6:
            raise ValueError("the shares of augmix, pixmix and structural must sum to 1")
        return self


class CleanSpec(BaseModel):
    """How clean views vary."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    crop: Literal["none", "resized"] = "none"
    """resized: a random resized crop of the file itself (data.crop_scale), for photographs."""
    flip: bool = True
    """Mirror half of the pictures."""
    pad: Annotated[int, Field(ge=0)] = 0
    """Shift by up to so many pixels, black outside; for small pictures."""


def clean_view(x: Tensor, spec: CleanSpec, generator: torch.Generator) -> Tensor:
    """[B, C, H, W] -> the same, each picture mirrored and shifted by chance."""
    batch, _, height, width = x.shape
    if spec.flip and spec.crop == "none":
        mirrored = torch.rand(batch, generator=generator) < 0.5
        x = torch.where(mirrored.to(x.device)[:, None, None, None], x.flip(3), x)
    if spec.pad:
        offset = torch.randint(0, 2 * spec.pad + 1, (2, batch), generator=generator).to(x.device)
        padded = F.pad(x, (spec.pad,) * 4)
        rows = offset[0, :, None] + torch.arange(height, device=x.device)
        columns = offset[1, :, None] + torch.arange(width, device=x.device)
        picture = torch.arange(batch, device=x.device)[:, None, None]
        x = padded.permute(0, 2, 3, 1)[picture, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return x


class Shifts:
    """Draws shifted views; holds the mixing set, made from the seed on first use.

    grey: the data set's pictures are grey, so the mixing pictures are made grey too.
    """

    def __init__(self, spec: ShiftSpec, size: tuple[int, int], seed: int, grey: bool = False) -> None:
        self.spec, self._size, self._seed, self._grey = spec, size, seed, grey
        self._mixing: Tensor | None = None

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> the same, shifted; in full precision whatever autocast is on."""
        with torch.autocast(x.device.type, enabled=False):
            return self._shifted(x, generator)

    def _shifted(self, x: Tensor, generator: torch.Generator) -> Tensor:
        spec = self.spec
        draw = torch.rand(len(x), generator=generator)
        kinds = torch.bucketize(draw, torch.tensor([spec.augmix, spec.augmix + spec.pixmix]), right=True)
        out = x.clone()
        for kind in range(3):
            rows = torch.nonzero(kinds == kind)[:, 0].to(x.device)
            if len(rows) == 0:
                continue
            part = x[rows]
            if kind == 0:
                part = augmix(part, generator, spec.severity, spec.width, spec.depth, spec.alpha)
            elif kind == 1:
                part = pixmix(part, self._mixing_set(x.device), generator, spec.k, spec.beta, spec.severity)
            else:
                part = structural(part, generator)
            out[rows] = part
        return out

    def _mixing_set(self, device: torch.device) -> Tensor:
        if self._mixing is None:
            height, width = self._size
            pictures = np.asarray(fractals(self.spec.mixing_set, max(height, width), self._seed))
            mixing = torch.from_numpy(pictures)[:, :, :height, :width].contiguous()
            if self._grey:
                mixing = mixing.float().mean(1, keepdim=True).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
            self._mixing = mixing
        if self._mixing.device != device:
            self._mixing = self._mixing.to(device)
        return self._mixing
