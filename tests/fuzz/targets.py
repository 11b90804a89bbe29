"""What is fuzzed: for each target a check that fails on a finding, seeds to start from, and a mutator that knows the
format.

A check takes any bytes. It ends silently where they are accepted with sense or refused with a TriviumError of one
printable line; anything else that it raises is a finding.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from tests.fuzz import mutators, seeds

from trivium.runtime.bundle import MANIFEST, Manifest, digest, open_bundle, read_manifest
from trivium.runtime.config import load
from trivium.runtime.engine import INPUT, OUTPUTS, _read_golden
from trivium.runtime.errors import BundleError, ConfigError, EngineError, InvalidPicture, InvalidRequest, TriviumError
from trivium.runtime.preprocess import Limits, decode
from trivium.runtime.security import Tokens
from trivium.runtime.weights import external_files
from trivium.runtime.wire import InferMessage, read_request, unpack_bytes

LINE_LIMIT = 4500
"""Characters of an error's line: a path of 1000 characters may be escaped in it."""
MAX_BATCH = 8
GROWN = 1 << 16
"""Bytes beyond which no edit makes a bundle's file longer: doubled twenty times it would only measure the test."""
PICTURE_LIMITS = Limits(max_bytes=1 << 20, max_pixels=1 << 20)
"""A picture within the server's own limits may rightly take a second and half a gigabyte; within these it may not."""
MODEL = Manifest.model_validate(seeds.manifest())


@dataclass(frozen=True)
class Target:
    """One entrance for strangers' bytes."""

    check: Callable[[bytes], None]
    seeds: list[bytes]
    mutate: Callable[[bytes, Random], bytes]
    runs: int
    """Inputs of a whole round."""
    max_length: int = 1 << 14
    """Bytes of an input."""


def targets(scratch: Path) -> dict[str, Target]:
    """Every target by name; those that read files write them below `scratch`."""
    scratch.mkdir(parents=True, exist_ok=True)
    return {
        "request": Target(check_request, seeds.requests(), mutators.request, 80_000),
        "elements": Target(check_elements, seeds.elements(), mutators.generic, 20_000),
        "picture": Target(check_picture, seeds.pictures(), mutators.picture, 60_000),
        "manifest": Target(partial(check_manifest, scratch / "m"), seeds.manifests(), mutators.json_document, 25_000),
        "bundle": Target(partial(check_bundle, scratch / "b"), seeds.bundle_edits(), mutators.generic, 15_000, 64),
        "golden": Target(partial(check_golden, scratch / "g"), seeds.golden_answers(), mutators.archive, 20_000),
        "weights": Target(partial(check_weights, scratch / "w"), seeds.models(), mutators.protobuf, 25_000),
        "tokens": Target(partial(check_tokens, scratch / "t"), seeds.token_files(), mutators.lines, 15_000),
        "settings": Target(partial(check_settings, scratch / "s"), seeds.settings(), mutators.lines, 10_000, 2048),
    }


def scratch_directory() -> Path:
    """A fresh directory, in memory where there is such a place: a disk would set the pace."""
    shared = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="trivium-fuzz-", dir=shared if os.access(shared, os.W_OK) else None))


def check_request(data: bytes) -> None:
    try:
        message = InferMessage(data)
    except DecodeError:
        return
    try:
        request = read_request(message.message, MODEL, MAX_BATCH, message.raw)
    except InvalidRequest as error:
        _one_line(error)
        return
    preprocessing = MODEL.preprocessing
    assert 1 <= request.size <= MAX_BATCH
    if request.images is None:
        assert len(request.encoded) == request.size
    else:
        assert request.images.shape == (request.size, preprocessing.height, preprocessing.width, 3)
        assert request.images.dtype == np.uint8
    assert request.router is None or request.router in MODEL.routers()
    assert request.timeout is None or request.timeout > 0
    assert request.outputs


def check_elements(data: bytes) -> None:
    size = data[0] % MAX_BATCH + 1 if data else 1
    try:
        elements = unpack_bytes(data[1:], size, "x")
    except InvalidRequest as error:
        _one_line(error)
        return
    assert len(elements) <= size + 1
    assert sum(4 + len(element) for element in elements) <= len(data[1:])


def check_picture(data: bytes) -> None:
    try:
        found = decode(data, MODEL.preprocessing, PICTURE_LIMITS)
    except InvalidPicture as error:
        _one_line(error)
        return
    assert found.shape == (MODEL.preprocessing.height, MODEL.preprocessing.width, 3)
    assert found.dtype == np.uint8


def check_manifest(root: Path, data: bytes) -> None:
    root.mkdir(exist_ok=True)
    (root / MANIFEST).write_bytes(data)
    try:
        manifest = read_manifest(root)
    except BundleError as error:
        _one_line(error)
        return
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
    assert manifest.router.default in manifest.routers()


def check_bundle(root: Path, data: bytes) -> None:
    """The bytes are edits of a whole bundle, three to an edit: what, of which file, where. See _edit."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for name, content in seeds.bundle_files().items():
        (root / name).write_bytes(content)
    _seal(root)
    for at in range(0, len(data) - 2, 3):
        _edit(root, *data[at : at + 3])
    try:
        bundle = open_bundle(root)
        if bundle.golden_path is not None:
            _read_golden(bundle.golden_path)
    except (BundleError, EngineError) as error:
        _one_line(error)
        return
    for file in bundle.manifest.files:
        assert digest(root / file.path) == file.sha256


def check_golden(root: Path, data: bytes) -> None:
    path = _file(root, "golden.npz", data)
    try:
        golden = _read_golden(path)
    except EngineError as error:
        _one_line(error)
        return
    assert set(golden) == {INPUT, *OUTPUTS}
    assert all(np.isfinite(values).dtype == bool for values in golden.values())


def check_weights(root: Path, data: bytes) -> None:
    path = _file(root, "model.onnx", data)
    try:
        names = external_files(path)
    except ValueError:
        # open_bundle makes an UnsafePath of it
        return
    assert all(isinstance(name, str) for name in names)


def check_tokens(root: Path, data: bytes) -> None:
    path = _file(root, "tokens", data)
    try:
        tokens = Tokens(path)
    except ConfigError as error:
        _one_line(error)
        return
    assert tokens.find(b"nobody's token") is None
    holder = tokens.find(seeds.TOKEN)
    assert holder is None or holder.name


def check_settings(root: Path, data: bytes) -> None:
    path = _file(root, "settings.yaml", data)
    try:
        found, _ = load(["--config", str(path)], {}, "trivium serve")
    except ConfigError as error:
        _one_line(error)
        return
    path.write_text(found.yaml(), encoding="utf-8")
    assert load(["--config", str(path)], {}, "trivium serve")[0] == found


def _file(root: Path, name: str, data: bytes) -> Path:
    root.mkdir(exist_ok=True)
    path = root / name
    path.write_bytes(data)
    return path


def _one_line(error: TriviumError) -> None:
    text = str(error)
    assert text
    assert text.isprintable(), repr(text)
    assert len(text) <= LINE_LIMIT, f"an error of {len(text)} characters"


def _seal(root: Path) -> None:
    """Make sizes and digests true again, whatever the files are now."""
    document: dict[str, Any] = seeds.manifest()
    present = [path for path in sorted(root.iterdir()) if path.name != MANIFEST and path.is_file()]
    document["files"] = [{"path": path.name, "size": path.stat().st_size, "sha256": digest(path)} for path in present]
    target = root / MANIFEST
    if target.is_dir():
        target.rmdir()
    target.write_text(json.dumps(document))


def _edit(root: Path, what: int, which: int, where: int) -> None:
    """One change to a bundle's directory; one that cannot be made is left out."""
    names = sorted(seeds.bundle_files()) + [MANIFEST]
    path = root / names[which % len(names)]
    other = root / names[where % len(names)]
    content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
    at = len(content) * where // 256
    kind = what % 10
    if kind == 0:
        _replace(path, content[:at])
    elif kind == 1 and content:
        _replace(path, content[:at] + bytes([content[at] ^ (1 + where % 255)]) + content[at + 1 :])
    elif kind == 2 and path.exists() and other.exists() and path != other:
        path.rename(root / "aside")
        other.rename(path)
        (root / "aside").rename(other)
    elif kind == 3:
        _replace(path, None)
    elif kind == 4 and len(content) < GROWN:
        _replace(path, content + content[:at])
    elif kind == 5:
        _replace(path, None)
        path.symlink_to(other if where % 2 else "/dev/zero")
    elif kind == 6:
        _replace(path, None)
        os.mkfifo(path)
    elif kind == 7:
        _replace(path, None)
        path.mkdir()
    elif kind == 8:
        (root / f"extra{where}").write_bytes(content)
    elif kind == 9 and not (root / MANIFEST).is_symlink() and not (root / MANIFEST).is_fifo():
        _seal(root)


def _replace(path: Path, content: bytes | None) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)
