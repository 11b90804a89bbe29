"""Residual networks for pictures of 28 to 64 pixels, registered with timm under names of their own."""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn


def _small_resnet(layers: tuple[int, ...], channels: tuple[int, ...], num_classes: int = 10, **kwargs: Any) -> ResNet:
    # A deep stem is asked for only because timm then takes its width from stem_width; it is replaced at once: one
    # 4 x 4 convolution of stride 2 halves the picture (a 28 x 28 one to 14 x 14) and nothing is pooled after it.
    net = ResNet(
        BasicBlock,  # type: ignore[arg-type]
        layers,
        num_classes=num_classes,
        channels=channels,
        stem_type="deep",
        stem_width=channels[0] // 2,
        **kwargs,
    )
    stem = nn.Conv2d(kwargs.get("in_chans", 3), channels[0], 4, stride=2, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    config = {
        "input_size": (3, 28, 28),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "num_classes": num_classes,
    }
    for name, value in {
        "conv1": stem,
        "maxpool": nn.Identity(),
        "pretrained_cfg": config,
        "default_cfg": config,
    }.items():
        setattr(net, name, value)
    return net


@register_model
def trivium_resnet10(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """1.2 M parameters: four stages of one basic block, 32 to 256 channels."""
    return _small_resnet((1, 1, 1, 1), (32, 64, 128, 256), **_plain(kwargs))


@register_model
def trivium_resnet10_small(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """0.3 M parameters: the same with 16 to 128 channels."""
    return _small_resnet((1, 1, 1, 1), (16, 32, 64, 128), **_plain(kwargs))


@register_model
def trivium_resnet10_tiny(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """0.08 M parameters: the same with 8 to 64 channels; a small teacher."""
    return _small_resnet((1, 1, 1, 1), (8, 16, 32, 64), **_plain(kwargs))


def _plain(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if not key.startswith("pretrained") and key != "cache_dir"}
