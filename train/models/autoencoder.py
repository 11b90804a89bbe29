"""Residual encoder and decoder between pictures and a coarse grid, with taming-transformers' modules and names."""

from __future__ import annotations

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..sections import Count, Section


class VqShape(Section):
    """Size of the autoencoder. One code stands for 2^(len(multipliers) - 1) patch pixels a side."""

    colours: Literal[1, 3] = 3
    """1: for grey pictures, whose reconstructions are grey then."""
    patch: Count = 1
    """Pixels a side that the first layer takes as channels; 1 in published files, 2 or more is cheaper."""
    channels: Annotated[int, Field(ge=4, multiple_of=4)] = 32
    multipliers: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 2, 2)
    """Of the channels, a level each; the side is halved between levels."""
    blocks: Count = 1
    """Residual blocks a level of the encoder; the decoder has one more."""
    attention: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Levels with attention, 0 the finest; the middle has it always."""
    codes: Annotated[int, Field(ge=2)] = 256
    dimension: Count = 16
    """Of a code."""

    @property
    def side(self) -> int:
        """Pixels a side that one code stands for."""
        return self.patch * 2 ** (len(self.multipliers) - 1)


class Encoder(nn.Module):
    """[B, inputs, H, W] -> [B, dimension, h, w]."""

    def __init__(self, shape: VqShape, inputs: int) -> None:
        super().__init__()
        width = shape.channels
        self.conv_in = nn.Conv2d(inputs, width, 3, padding=1)
        self.down = nn.ModuleList()
        for index, times in enumerate(shape.multipliers):
            level = Level(width, times * shape.channels, shape.blocks, index in shape.attention)
            width = times * shape.channels
            if index < len(shape.multipliers) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(width)
        self.norm_out = norm(width)
        self.conv_out = nn.Conv2d(width, shape.dimension, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return out


class Decoder(nn.Module):
    """[B, dimension, h, w] -> [B, outputs, H, W]."""

    def __init__(self, shape: VqShape, outputs: int) -> None:
        super().__init__()
        width = shape.channels * shape.multipliers[-1]
        self.conv_in = nn.Conv2d(shape.dimension, width, 3, padding=1)
        self.mid = Middle(width)
        levels = []
        for index, times in reversed(list(enumerate(shape.multipliers))):
            level = Level(width, times * shape.channels, shape.blocks + 1, index in shape.attention)
            width = times * shape.channels
            if index:
                level.upsample = Upsample(width)
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))  # number 0 is the finest, as in the encoder
        self.norm_out = norm(width)
        self.conv_out = nn.Conv2d(width, outputs, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class Level(nn.Module):
    """Residual blocks of one resolution, each perhaps with attention, then perhaps a change of resolution."""

    def __init__(self, inputs: int, outputs: int, blocks: int, attention: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(Residual(inputs if i == 0 else outputs, outputs) for i in range(blocks))
        self.attn = nn.ModuleList(Attention(outputs) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        for change in ("downsample", "upsample"):
            if change in self._modules:
                x = getattr(self, change)(x)
        return x


class Middle(nn.Module):
    """Block, attention, block at the coarsest resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = Residual(width, width), Attention(width), Residual(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


class Residual(nn.Module):
    """Norm, swish, convolution, twice, beside a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = self.nin_shortcut(x) + h
        return out


class Attention(nn.Module):
    """One head over all positions, added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (each(h).flatten(2).transpose(1, 2).contiguous() for each in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        out: Tensor = x + self.proj_out(h)
        return out


class Downsample(nn.Module):
    """Half the side; the picture is padded at the right and below only, as in published files."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Twice the side."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


def norm(width: int) -> nn.GroupNorm:
    """Group norm of so many channels."""
    # 32 groups in published files; narrower layers keep at least four channels a group, so that the mean survives.
    return nn.GroupNorm(min(32, width // 4), width, eps=1e-6)
