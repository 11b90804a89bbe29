"""Pretrained classifiers: any timm model by name, its weights, and its split into stages, neck and linear head."""

from __future__ import annotations

import copy
import difflib
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from trivium.runtime.bundle import Preprocessing
from trivium.runtime.errors import ConfigError

from . import small  # noqa: F401  registers the nets for small pictures with timm

Layout = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]

LAYOUTS: tuple[Layout, ...] = (
    (("conv1", "bn1", "act1", "maxpool"), ("layer1", "layer2", "layer3", "layer4"), ()),  # ResNet and its kin
    (("conv_stem", "bn1"), ("blocks*",), ("conv_head", "bn2")),  # EfficientNet, MobileNetV2
    (("conv_stem", "bn1"), ("blocks*",), ()),  # MobileNetV3 and V4
    (("stem",), ("stages*",), ("norm_pre",)),  # ConvNeXt
    (("stem",), ("s1", "s2", "s3", "s4"), ("final_conv",)),  # RegNet
    (("stem",), ("stages*",), ("final_conv", "final_act")),  # NFNet
    (("stem",), ("stages*",), ("final_conv",)),  # ByobNet
    (("stem",), ("stages*",), ("norm",)),  # ResNetV2, MaxViT
    (("stem",), ("stages*",), ()),  # MetaFormer
    (("patch_embed", "_pos_embed", "patch_drop", "norm_pre"), ("blocks*",), ("norm",)),  # ViT, DeiT
    (("patch_embed",), ("layers*",), ("norm",)),  # Swin
    ((), ("features*",), ()),  # VGG, DenseNet
)
"""Names of (stem, stages, last touches), in the order in which forward_features calls them; a star expands a container.

A layout is a guess: it counts only where the composition gives the features of the model itself.
"""


class Part(nn.Module):
    """Some of a model's children or methods, applied one after the other; holds no more of the model than they use."""

    def __init__(self, model: nn.Module, calls: Sequence[str], without: Iterable[str], parameters: bool = True) -> None:
        super().__init__()
        part = copy.copy(model)
        part._modules = {name: child for name, child in model._modules.items() if name not in set(without)}
        if not parameters:
            part._parameters = {}
        self.model: nn.Module = part
        self.calls = tuple(calls)

    def forward(self, x: Tensor) -> Tensor:
        for call in self.calls:
            x = getattr(self.model, call)(x)
        return x


class Neck(Part):
    """From feature maps or tokens to the pooled features [B, D] that the final linear layer sees."""

    def __init__(self, model: nn.Module, without: Iterable[str], head: nn.Module) -> None:
        super().__init__(model, (), without, parameters=False)
        self.model = _without(self.model, head)

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.model.forward_head(x, pre_logits=True)  # type: ignore[operator]
        return pooled


class Classifier(nn.Module):
    """A classifier as it is, seen as stages, neck and one linear head, with the interface of a Student (K = 1).

    `stages` composed give the model's forward_features; `splittable` says whether there is more than one.
    """

    head_names: tuple[str, ...] = ("original",)

    def __init__(
        self, stages: Sequence[nn.Module], neck: nn.Module, head: nn.Linear, dropout_rate: float = 0.5
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.neck = neck
        self.head = head
        self.dropout_rate = dropout_rate

    @property
    def splittable(self) -> bool:
        return len(self.stages) > 1

    def features(self, x: Tensor) -> Tensor:
        """Normalised pictures [B, 3, H, W] -> pooled features [B, D]."""
        for stage in self.stages:
            x = stage(x)
        pooled: Tensor = self.neck(x)
        return pooled

    def head_weights(self) -> tuple[Tensor, Tensor]:
        """(weights [1, C, D], bias [1, C])."""
        return self.head.weight[None], _bias(self.head)[None]

    def original_logits(self, x: Tensor) -> Tensor:
        """Normalised pictures [B, 3, H, W] -> logits [B, C]."""
        logits: Tensor = self.head(self.features(x))
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.original_logits(x)


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
        raise ConfigError(f"timm model {name!r} does not take {extra}: {_one_line(error)}") from None
    except Exception as error:
        # The hub's client raises errors of several packages (httpx, huggingface_hub, urllib), by version.
        if not pretrained:
            raise ConfigError(f"timm cannot build {name!r} with {extra}: {_one_line(error)}") from None
        raise ConfigError(
            f"no pretrained weights for {name!r}: not in the hub's cache and not downloadable ({_one_line(error)}); "
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


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors by name from a safetensors file or a torch state dict, without running any pickled code.

    Raises: ConfigError.
    """
    source = Path(path)
    if not source.is_file():
        raise ConfigError(f"{source}: no such weights file")
    try:
        if source.suffix == ".safetensors":
            return load_file(source)
        state = torch.load(source, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise ConfigError(f"{source}: unreadable weights ({_one_line(error)})") from None
    except Exception as error:
        # torch reports whatever is no plain state dict as pickle.UnpicklingError, and a cut one in several ways.
        raise ConfigError(f"{source}: no plain state dict ({_one_line(error)})") from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(t, Tensor) for t in state.values()):
        raise ConfigError(f"{source}: no state dict of tensors")
    return {str(key).removeprefix("module."): tensor for key, tensor in state.items()}


def split(model: nn.Module, height: int, width: int, dropout_rate: float = 0.5) -> Classifier:
    """See a timm model as stages, neck and linear head, sharing its parameters.

    The split is compared with the model itself on random pictures [2, 3, height, width]; where no layout reproduces
    it, all of forward_features is one stage.

    Raises: ConfigError where the last layer is not linear or its input cannot be had.
    """
    was_training = model.training
    model.eval()
    head = model.get_classifier()  # type: ignore[operator]
    if not isinstance(head, nn.Linear):
        raise ConfigError(f"the last layer of {type(model).__name__} is {type(head).__name__}, not one linear layer")
    probe = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    probe = probe.to(head.weight.device)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            maps, logits = model.forward_features(probe), model(probe)  # type: ignore[operator]
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(
                f"{type(model).__name__} does not take pictures of {height} x {width}: {_one_line(error)}"
            ) from None
        for candidate in _candidates(model, head, dropout_rate):
            if _same(candidate, probe, maps, logits):
                model.train(was_training)
                return candidate.train(was_training)
    raise ConfigError(f"the features before the last layer of {type(model).__name__} cannot be had")


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


def _same(candidate: Classifier, probe: Tensor, maps: Tensor, logits: Tensor) -> bool:
    try:
        x = probe
        for stage in candidate.stages:
            x = stage(x)
        again = candidate.original_logits(probe)
    except (RuntimeError, AttributeError, TypeError, NotImplementedError):
        return False  # this guess does not even run; the next one may
    return (
        x.shape == maps.shape
        and torch.allclose(x, maps, atol=1e-5, rtol=1e-4)
        and torch.allclose(again, logits, atol=1e-4, rtol=1e-3)
    )


def _candidates(model: nn.Module, head: nn.Linear, dropout_rate: float) -> Iterable[Classifier]:
    classifier = next((name for name, child in model.named_children() if child is head), "")
    for stem, body, last in LAYOUTS:
        names = [name.removesuffix("*") for name in (*stem, *body, *last)]
        if not all(hasattr(model, name) for name in names):
            continue
        bodies = [m for name in body for m in _expand(getattr(model, name.removesuffix("*")), name.endswith("*"))]
        if len(bodies) < 2:
            continue
        after = [getattr(model, name) for name in last]
        if not all(isinstance(module, nn.Module) for module in (*bodies, *after)):
            continue
        if after:
            bodies[-1] = nn.Sequential(bodies[-1], *after)
        if stem:
            # Children without tensors stay: a method of the model (_pos_embed) may call them.
            others = [name for name, child in model.named_children() if name not in stem and child.state_dict()]
            bodies.insert(0, Part(model, stem, others))
        yield Classifier(bodies, Neck(model, names, head), head, dropout_rate)
    features = [name for name, _ in model.named_children()]
    whole = Part(model, ("forward_features",), [classifier])
    yield Classifier([whole], Neck(model, features, head), head, dropout_rate)
    # forward_head of these needs children that forward_features uses too; the parameters are then held in common.
    yield Classifier([whole], Neck(model, [], head), head, dropout_rate)


def _without(model: nn.Module, head: nn.Module) -> nn.Module:
    """The same modules, but the head, wherever it is nested, is an identity; the model itself is not changed."""
    changed = copy.copy(model)
    changed._modules = {
        name: nn.Identity() if child is head else _without(child, head) if child and head in child.modules() else child
        for name, child in model._modules.items()
    }
    return changed


def _expand(module: nn.Module, container: bool) -> list[nn.Module]:
    return list(module.children()) if container else [module]


def _classifier_prefix(model: nn.Module) -> str:
    head = model.get_classifier()  # type: ignore[operator]
    return next((name for name, module in model.named_modules() if module is head), "")


def _bias(linear: nn.Linear) -> Tensor:
    return linear.bias if linear.bias is not None else linear.weight.new_zeros(linear.out_features)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text or type(error).__name__)[:200]
