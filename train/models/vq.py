"""A vector-quantised autoencoder (VQ-VAE, VQGAN): pictures to codes and back, Q(x) = decode(quantise(encode(x))).

Modules and names are those of taming-transformers (Esser et al. 2021), so that its published files load. What is here:
residual encoder and decoder, attention, a codebook kept as moving averages of what it stands for (van den Oord et al.
2017, appendix A.1), begun from data and with dead codes begun anew, the commitment loss, and a patch discriminator at
a fixed weight. What is not: the perceptual loss (it needs a trained VGG), the discriminator's adaptive weight and its
late start, Gumbel quantisation.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from trivium.runtime.errors import ConfigError

from .autoencoder import Decoder, Encoder, VqShape, norm
from .backbone import read_state

DISTANCES = 1 << 24
"""Distances to codes that are in memory at once."""


TAMING_F8 = VqShape(channels=128, multipliers=(1, 2, 2, 4), blocks=2, attention=(3,), codes=16384, dimension=4)
"""VQGAN f = 8 trained on OpenImages: 67 M parameters."""


class Codebook(nn.Module):
    """The codes [K, D] as a buffer: no gradient moves them."""

    def __init__(self, codes: int, dimension: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(codes, dimension).uniform_(-1 / codes, 1 / codes))
        self.weight: Tensor

    def forward(self, codes: Tensor) -> Tensor:
        """Indices [...] -> codes [..., D]."""
        return F.embedding(codes, self.weight)


class Quantiser(nn.Module):
    """The codebook. In training mode it follows its inputs; gradients pass it unchanged (straight through).

    All that moves are buffers and each step looks at those before it alone, so that a batch may be cut into slices
    whose moves are averaged; what a dead code begins anew as is then an average too.
    """

    def __init__(self, codes: int, dimension: int, decay: float = 0.99, dead: float = 0.1) -> None:
        """decay: of the moving averages. dead: a code chosen less often than this share of an even one begins anew, as
        a random input."""
        super().__init__()
        self.decay, self.dead = decay, dead
        self.embedding = Codebook(codes, dimension)
        self.register_buffer("count", torch.ones(codes))
        self.register_buffer("total", self.embedding.weight.clone())
        self.count: Tensor
        self.total: Tensor

    def train(self, mode: bool = True) -> Quantiser:
        """As nn.Module's; the end of training brings the codes to where their averages are."""
        if self.training and not mode:
            self._settle()
        super().train(mode)
        return self

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, D, h, w] -> (quantised [B, D, h, w], codes int64 [B, h, w], mean squared distance from the codes)."""
        rows = z.permute(0, 2, 3, 1)
        flat = rows.detach().reshape(-1, rows.shape[-1]).float()
        if self.training:
            self._settle()
        codes = self.nearest(flat)
        quantised = self.embedding(codes).view(rows.shape).permute(0, 3, 1, 2)
        distance = F.mse_loss(z.float(), quantised)
        if self.training:
            self._follow(flat, codes)
        return z + (quantised - z).detach(), codes.view(rows.shape[:3]), distance

    @torch.no_grad()
    def begin(self, z: Tensor) -> None:
        """Take random rows of encoder outputs [B, D, h, w] for codes."""
        rows = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]).float()
        chosen = torch.randperm(len(rows)).repeat(math.ceil(len(self.count) / len(rows)))[: len(self.count)]
        self.count.fill_(len(rows) / len(self.count))
        self.total.copy_(rows[chosen.to(rows.device)] * self.count[:, None])
        self._settle()

    def nearest(self, rows: Tensor) -> Tensor:
        """Index of the nearest code, int64 [N], of each row [N, D]."""
        book = self.embedding.weight
        half = book.square().sum(1) / 2
        with torch.autocast(rows.device.type, enabled=False):
            parts = rows.split(max(DISTANCES // len(book), 1))
            return torch.cat([(half - part @ book.T).argmin(1) for part in parts])

    def _settle(self) -> None:
        self.embedding.weight.copy_(self.total / self.count[:, None])

    @torch.no_grad()
    def _follow(self, rows: Tensor, codes: Tensor) -> None:
        even = len(rows) / len(self.count)
        dead = (self.count < self.dead * even).nonzero()[:, 0]
        count = torch.bincount(codes, minlength=len(self.count)).to(rows.dtype)
        self.count.lerp_(count, 1 - self.decay)
        self.total.lerp_(torch.zeros_like(self.total).index_add_(0, codes, rows), 1 - self.decay)
        if len(dead):
            self.count[dead] = even
            self.total[dead] = rows[torch.randint(len(rows), (len(dead),)).to(rows.device)] * even


class VQGAN(nn.Module):
    """Encoder, codebook and decoder."""

    def __init__(self, shape: VqShape) -> None:
        super().__init__()
        self.shape = shape
        inputs = shape.colours * shape.patch**2
        self.encoder = Encoder(shape, inputs)
        self.decoder = Decoder(shape, inputs)
        self.quantize = Quantiser(shape.codes, shape.dimension)
        self.quant_conv = nn.Conv2d(shape.dimension, shape.dimension, 1)
        self.post_quant_conv = nn.Conv2d(shape.dimension, shape.dimension, 1)

    def fits(self, height: int, width: int) -> None:
        """Raises: ConfigError for pictures whose sides no whole number of codes covers."""
        if height % self.shape.side or width % self.shape.side:
            raise ConfigError(
                f"the discretiser takes pictures whose sides are multiples of {self.shape.side}, not {height} x {width}"
            )

    def encode(self, x: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] -> what the codebook sees [B, D, h, w]."""
        x = 2 * x - 1
        if self.shape.colours == 1:
            x = x.mean(1, keepdim=True)
        z: Tensor = self.quant_conv(self.encoder(F.pixel_unshuffle(x, self.shape.patch)))
        return z

    def codes(self, x: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] -> codes, int64 [B, h, w]."""
        codes: Tensor = self.quantize(self.encode(x))[1]
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """Codes int64 [B, h, w] -> pictures [B, 3, H, W] in [0, 1]."""
        return self._pictures(self.quantize.embedding(codes).permute(0, 3, 1, 2)).clamp(0, 1)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Q(x): pictures [B, 3, H, W] in [0, 1] -> the same."""
        return self.decode(self.codes(x))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures [B, 3, H, W] in [0, 1] -> (reconstructions, not clamped; codes int64 [B, h, w]; the commitment
        loss), differentiable straight through the codebook."""
        quantised, codes, distance = self.quantize(self.encode(x))
        return self._pictures(quantised), codes, distance

    def _pictures(self, quantised: Tensor) -> Tensor:
        x = F.pixel_shuffle(self.decoder(self.post_quant_conv(quantised)), self.shape.patch)
        return ((x + 1) / 2).expand(-1, 3, -1, -1).float()


class Discriminator(nn.Sequential):
    """Real or reconstructed, a logit for each patch of 16 pixels a side [B, 1, h, w] (PatchGAN, Isola et al. 2017)."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__(
            nn.Conv2d(3, channels, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(channels, 2 * channels, 4, 2, 1, bias=False),
            norm(2 * channels),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * channels, 1, 3, 1, 1),
        )


class VqTraining(nn.Module):
    """The autoencoder and, where it takes part, the discriminator, under one loss and one optimizer."""

    def __init__(self, vq: VQGAN, adversarial: float) -> None:
        super().__init__()
        self.vq, self.adversarial = vq, adversarial
        self.discriminator = Discriminator() if adversarial else None

    def forward(self, x: Tensor, commitment: float) -> tuple[Tensor, dict[str, float]]:
        """Loss of pictures [B, 3, H, W] in [0, 1]: |x - Q(x)| + (x - Q(x))^2 + commitment |z - code|^2, and where
        adversarial > 0 the hinge losses of discriminator and decoder (Lim and Ye 2017)."""
        again, codes, distance = self.vq(x)
        squared = F.mse_loss(again, x)
        loss = F.l1_loss(again, x) + squared + commitment * distance
        used = len(codes.unique()) / self.vq.shape.codes
        parts = {"psnr": -10 * math.log10(max(squared.item(), 1e-10)), "codes_used": used}
        if self.discriminator is not None:
            # One backward pass serves both: the decoder sees the discriminator as constants, and the reverse.
            constants = {name: each.detach() for name, each in self.discriminator.named_parameters()}
            fooled = functional_call(self.discriminator, constants, (again,)).float()
            real, fake = self.discriminator(torch.cat([x, again.detach()])).float().chunk(2)
            told = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
            loss = loss - self.adversarial * fooled.mean() + told
            parts["discriminator"] = told.item()
        return loss, parts


def load_vq(path: str | os.PathLike[str]) -> VQGAN:
    """An autoencoder in eval mode from a local file: one trained here, or one of taming-transformers or
    latent-diffusion with vector quantisation, as safetensors or a torch state dict (weights_only); its shape is read
    off the tensors.

    Raises: ConfigError with one line.
    """
    parts = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
    stripped = {key.removeprefix("vq."): value for key, value in read_state(path).items()}  # vq.: of VqTraining
    found = {key: value for key, value in stripped.items() if key.startswith(parts)}
    if "quantize.embed.weight" in found:
        raise ConfigError(f"{path}: a Gumbel-quantised autoencoder; only those with a plain codebook are read")
    try:
        shape = shape_of(found)
    except (KeyError, ValueError, IndexError, AttributeError):
        raise ConfigError(f"{path}: no vector-quantised autoencoder with the tensors of taming-transformers") from None
    # The moving averages of training, which published files have not, are where the codes are.
    book = found["quantize.embedding.weight"]
    found = {"quantize.count": torch.ones(len(book)), "quantize.total": book.clone()} | found
    model = VQGAN(shape)
    own = model.state_dict()
    missing, extra = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
    wrong = sorted(key for key in own.keys() & found.keys() if own[key].shape != found[key].shape)
    if missing or extra or wrong:
        raise ConfigError(
            f"{path}: not an autoencoder of this kind: {len(missing)} tensors missing (first: {missing[:1]}), "
            f"{len(extra)} unknown (first: {extra[:1]}), {len(wrong)} of another shape (first: {wrong[:1]})"
        )
    model.load_state_dict(found)
    return model.eval()


def shape_of(tensors: Mapping[str, Tensor]) -> VqShape:
    """The shape that tensors of these names and sizes have.

    Raises: KeyError, ValueError where they have none.
    """
    first = tensors["encoder.conv_in.weight"]
    codes, dimension = tensors["quantize.embedding.weight"].shape
    pattern = re.compile(r"encoder\.down\.(\d+)\.(block|attn)\.(\d+)\.(?:conv2|proj_out)\.weight")
    matches = [match for key in tensors if (match := pattern.fullmatch(key))]
    levels = max(int(match[1]) for match in matches) + 1
    widths = [len(tensors[f"encoder.down.{level}.block.0.conv2.weight"]) for level in range(levels)]
    inputs, channels = first.shape[1], first.shape[0]
    for colours in (1, 3):
        patch = math.isqrt(inputs // colours)
        if colours * patch**2 == inputs:
            return VqShape(
                colours=colours,
                patch=patch,
                channels=channels,
                multipliers=tuple(width // channels for width in widths),
                blocks=max(int(match[3]) for match in matches if match[2] == "block") + 1,
                attention=tuple(sorted({int(match[1]) for match in matches if match[2] == "attn"})),
                codes=codes,
                dimension=dimension,
            )
    raise ValueError(f"{inputs} channels are neither colours nor patches")
