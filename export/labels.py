"""Class names: from a user's file, or ImageNet's where the model is known to answer in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trivium.runtime.errors import ConfigError


def read_labels(path: Path) -> list[str]:
    """Names from a text file (one a line, in the order of the outputs) or a JSON list of strings.

    Raises: ConfigError where the file cannot be read, is empty or holds an empty name.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--labels {path}: {getattr(error, 'strerror', None) or 'no UTF-8 text'}") from None
    if path.suffix == ".json":
        try:
            names = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"--labels {path}: no valid JSON ({error})") from None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"--labels {path}: not a JSON list of strings")
    else:
        names = text.splitlines()
    names = [name.strip() for name in names]
    if not names or not all(names):
        raise ConfigError(f"--labels {path}: {'empty' if not names else 'a name is empty'}")
    return names


def imagenet_labels(classes: int) -> list[str] | None:
    """WordNet's descriptions of ImageNet-1k's classes in their usual order, from timm; None for any other number."""
    from timm.data.imagenet_info import ImageNetInfo

    info: Any = ImageNetInfo("imagenet-1k")
    if info.num_classes() != classes:
        return None
    return [info.index_to_description(index) for index in range(classes)]
