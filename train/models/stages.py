"""A timm model seen as an ordered list of stages, a neck and one linear head, verified against the model itself."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from trivium.runtime.errors import ConfigError

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
        self.frozen = 0

    def tune(self, depth: int) -> Classifier:
        """Freeze all but the last `depth` stages, neck and head; batch norms of the frozen keep their statistics.

        Raises: ConfigError where there are no such stages.
        """
        if depth > 0 and not self.splittable:
            raise ConfigError("no verified split of this model into stages: tune 0 of them, or all")
        if depth >= len(self.stages):
            raise ConfigError(f"{depth} stages to tune, this model has {len(self.stages)}: 0 to {len(self.stages) - 1}")
        self.frozen = len(self.stages) - depth
        for stage in self.stages[: self.frozen]:
            stage.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode: bool = True) -> Classifier:
        """As nn.Module's; frozen stages stay in eval mode."""
        super().train(mode)
        for stage in self.stages[: self.frozen]:
            stage.eval()
        return self

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
        return self.head.weight[None], bias_of(self.head)[None]

    def original_logits(self, x: Tensor) -> Tensor:
        """Normalised pictures [B, 3, H, W] -> logits [B, C]."""
        logits: Tensor = self.head(self.features(x))
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.original_logits(x)


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
                f"{type(model).__name__} does not take pictures of {height} x {width}: {one_line(error)}"
            ) from None
        for candidate in _candidates(model, head, dropout_rate):
            if _same(candidate, probe, maps, logits):
                model.train(was_training)
                return candidate.train(was_training)
    raise ConfigError(f"the features before the last layer of {type(model).__name__} cannot be had")


def one_line(error: BaseException) -> str:
    """The text of an error without its line breaks."""
    text = " ".join(str(error).split())
    return (text or type(error).__name__)[:200]


def bias_of(linear: nn.Linear) -> Tensor:
    """The bias [C] of a linear layer, zeros where it has none."""
    return linear.bias if linear.bias is not None else linear.weight.new_zeros(linear.out_features)


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
