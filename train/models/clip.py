"""CLIP by open_clip as a classifier with timm's interface: image tower, L2 norm, and a linear head made of prompts.

logits = exp(logit_scale) <image / |image|, w_c>, w_c the normalised mean of the normalised embeddings of class c's
prompts (Radford et al. 2021, section 3.1.4). The text tower is left out once the head is made.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationError
from torch import Tensor, nn

from trivium.runtime.errors import ConfigError

from ..sections import Section
from .backbone import read_state
from .stages import one_line

PREFIX = "clip:"
"""Of a recipe's model: clip:ViT-B-32 and so on, by open_clip's names."""


class ClipSettings(Section):
    """A CLIP model's kwargs in a recipe."""

    templates: tuple[str, ...] = Field(("a photo of a {}.",), min_length=1)
    """Prompts, {} the class; their embeddings are averaged."""
    names: tuple[str, ...] | None = None
    """What the classes are called in prompts, in their order; None: the data's names."""


class ClipClassifier(nn.Module):
    """Image tower and head.

    Args:
        visual: normalised pictures [B, 3, H, W] -> embeddings [B, D].
        head: unit embeddings [B, D] -> logits [B, C].
        config: timm's description of the input (input_size, mean, std and so on).
    """

    def __init__(self, visual: nn.Module, head: nn.Linear, config: dict[str, Any]) -> None:
        super().__init__()
        self.visual, self.head, self.pretrained_cfg = visual, head, config

    def get_classifier(self) -> nn.Linear:
        return self.head

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised pictures [B, 3, H, W] -> embeddings [B, D]."""
        features: Tensor = self.visual(x)
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Embeddings [B, D] -> logits [B, C], or unit embeddings where pre_logits."""
        unit = F.normalize(x, dim=-1)
        return unit if pre_logits else self.head(unit)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def is_clip(model: str) -> bool:
    """Whether a recipe's model names one of open_clip."""
    return model.startswith(PREFIX)


def create_clip(
    model: str, classes: Sequence[str], kwargs: Mapping[str, Any] | None = None, weights: str | None = None
) -> ClipClassifier:
    """A CLIP classifier for the classes.

    Args:
        model: PREFIX and open_clip's name; those of OpenAI's weights end in -quickgelu.
        kwargs: fields of ClipSettings.
        weights: a local file of open_clip, whose head is made of prompts; or one written from a ClipClassifier, whose
            head is taken as it is; None leaves both random, to be filled.

    Raises: ConfigError with one line.
    """
    try:
        settings = ClipSettings.model_validate(dict(kwargs or {}))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{model}: kwargs.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    try:
        import open_clip
    except ModuleNotFoundError:
        raise ConfigError(f"{model} needs open_clip; run: pip install 'trivium[clip]'") from None
    name = model.removeprefix(PREFIX)
    if name not in open_clip.list_models():
        near = difflib.get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.5)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise ConfigError(f"open_clip has no model {name!r}{hint}")
    if weights is not None and not Path(weights).is_file():
        raise ConfigError(f"{model}: weights must be a local file, and {weights!r} is none")
    names = classes if settings.names is None else settings.names
    if len(names) != len(classes):
        raise ConfigError(f"{model}: kwargs.names has {len(names)} names, the data has {len(classes)} classes")
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # open_clip warns of random weights, which are filled below
    try:
        net = open_clip.create_model(name, pretrained=None, load_weights=False)
    finally:
        logging.disable(before)
    net.eval().requires_grad_(False)
    seen = open_clip.get_model_preprocess_cfg(net)
    height, width = (seen["size"],) * 2 if isinstance(seen["size"], int) else seen["size"]
    config = {
        "input_size": (3, height, width),
        "mean": tuple(seen["mean"]),
        "std": tuple(seen["std"]),
        "interpolation": seen["interpolation"],
        "crop_pct": 1.0,
        "num_classes": len(classes),
    }
    made = weights is not None and "head.weight" in read_state(weights)
    if weights is not None and not made:
        try:
            open_clip.load_checkpoint(net, weights)
        except Exception as error:
            # open_clip raises whatever its conversions of other projects' files stumble over.
            raise ConfigError(f"{weights}: no weights of {name} ({one_line(error)})") from None
        head = zero_shot_head(net, open_clip.get_tokenizer(name), names, settings.templates)
    else:
        with torch.no_grad():
            dimension = net.encode_image(torch.zeros(1, 3, height, width)).shape[1]
        head = nn.Linear(dimension, len(classes), bias=False)
    net.visual.requires_grad_(True)
    classifier = ClipClassifier(net.visual, head, config)
    if made:
        assert weights is not None
        try:
            classifier.load_state_dict(read_state(weights))
        except RuntimeError as error:
            raise ConfigError(
                f"{weights}: no {name} with a head of {len(classes)} classes ({one_line(error)})"
            ) from None
    return classifier


@torch.no_grad()
def zero_shot_head(net: Any, tokenizer: Any, names: Sequence[str], templates: Sequence[str]) -> nn.Linear:
    """The linear layer without bias [D -> C] that prompts make, the logit scale inside."""
    import open_clip

    prompts = [partial(str.replace, template, "{}") for template in templates]
    weights = open_clip.build_zero_shot_classifier(net, tokenizer, list(names), prompts)
    head = nn.Linear(weights.shape[0], weights.shape[1], bias=False)
    head.weight.copy_(net.logit_scale.exp() * weights.T)
    return head
