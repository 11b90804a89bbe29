"""What kustomize makes of our kustomizations, as far as they go: resources, components, merge patches, images, files.

It stands in where there is no kustomize, and refuses what it does not know; a test holds it against the real one.
"""

from __future__ import annotations

import copy
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import yaml

Document = dict[str, Any]
Load = Callable[[Path], list[Document]]
KEYS = {"containers": "name", "volumes": "name", "env": "name", "volumeMounts": "mountPath", "ports": "containerPort"}
"""Lists that a patch is merged into element by element, by the field that tells elements apart; others it replaces."""


def load(path: Path) -> list[Document]:
    """The documents of a YAML file."""
    return copy.deepcopy(_load(path))


@cache
def _load(path: Path) -> list[Document]:
    return [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document is not None]


def render(folder: Path, read: Load = load) -> list[Document]:
    """The objects that a kustomization stands for; `read` may see other files than there are on the disk.

    Raises: ValueError for what cannot be rendered, KeyError for a field that is missing.
    """
    return _fill(folder, [], read)


def _fill(folder: Path, objects: list[Document], read: Load) -> list[Document]:
    (settings,) = read(folder / "kustomization.yaml")
    known = {"apiVersion", "kind", "resources", "components", "patches", "images", "configMapGenerator"}
    if set(settings) - known:
        raise ValueError(f"{folder}: {set(settings) - known}: not known here")
    for name in settings.get("resources", ()):
        path = (folder / name).resolve()
        objects += _fill(path, [], read) if path.is_dir() else read(path)
    for generator in settings.get("configMapGenerator", ()):
        data = {name: (folder / name).read_text(encoding="utf-8") for name in generator["files"]}
        objects += [
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": generator["name"]}, "data": data},
        ]
    for name in settings.get("components", ()):
        objects = _fill((folder / name).resolve(), objects, read)
    for patch in settings.get("patches", ()):
        for change in read(folder / patch["path"]):
            _merge(_find(objects, change), change)
    for image in settings.get("images", ()):
        _rename(objects, image)
    return objects


def _find(objects: list[Document], change: Document) -> Document:
    def identity(one: Document) -> tuple[Any, ...]:
        return one["apiVersion"], one["kind"], one["metadata"]["name"]

    found = [one for one in objects if identity(one) == identity(change)]
    if len(found) != 1:
        raise ValueError(f"a patch for {identity(change)} finds {len(found)} objects")
    return found[0]


def _merge(target: Document, change: Document) -> None:
    for key, value in change.items():
        there = target.get(key)
        if isinstance(value, dict) and isinstance(there, dict):
            _merge(there, value)
        elif isinstance(value, list) and isinstance(there, list) and key in KEYS:
            for element in value:
                same = [each for each in there if each.get(KEYS[key]) == element.get(KEYS[key])]
                if same:
                    _merge(same[0], element)
                else:
                    # as kustomize does, new ones come first
                    there.insert(0, copy.deepcopy(element))
        else:
            target[key] = copy.deepcopy(value)


def _rename(node: Any, image: dict[str, str]) -> None:
    if isinstance(node, list):
        for element in node:
            _rename(element, image)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key == "image" and value == image["name"]:
                node[key] = f"{image.get('newName', value)}:{image['newTag']}"
            else:
                _rename(value, image)


def program() -> list[str] | None:
    """The words that start a real kustomize, if there is one."""
    if path := shutil.which("kustomize"):
        return [path, "build"]
    if path := shutil.which("kubectl"):
        return [path, "kustomize"]
    return None


def real(words: list[str], folder: Path) -> list[Document]:
    """What the real one makes of a folder, without the hashes that it appends to the names of what it generates."""
    done = subprocess.run([*words, str(folder)], capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        raise ValueError(done.stderr)
    text = done.stdout
    for one in list(yaml.safe_load_all(text)):
        if one["kind"] == "ConfigMap":
            name = one["metadata"]["name"]
            text = text.replace(name, name.rsplit("-", 1)[0])
    return list(yaml.safe_load_all(text))
