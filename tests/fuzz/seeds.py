"""Small valid inputs of every target, from which mutations start."""

from __future__ import annotations

import io
import json
from functools import lru_cache
from typing import Any

import numpy as np
from tests.fuzz.evil import evil_pictures
from tritonclient.grpc import service_pb2

from trivium.runtime.config import Settings
from trivium.runtime.wire import pack_bytes

SIDE, CLASSES = 4, 3
HEADS = ("clean", "robust", "combined")
TOKEN = b"a token that some seeds hold"
SMALL = 6000
"""Bytes; larger pictures are for other tests."""


def manifest() -> dict[str, Any]:
    """The manifest of a three-headed bundle for pictures of 4 x 4."""
    scores = ("divergence", "mutual_information", "energy")
    return {
        "format": "trivium-bundle",
        "schema_version": 1,
        "name": "tiny",
        "version": "1",
        "classes": [f"class {i}" for i in range(CLASSES)],
        "heads": list(HEADS),
        "preprocessing": {"height": SIDE, "width": SIDE, "resize": 5, "mean": [0.5] * 3, "std": [0.25] * 3},
        "dropout": {"rate": 0.5, "passes": 32, "seed": 7},
        "router": {
            "default": "blend",
            "paper": {"divergence_threshold": 0.4, "entropy_scale": {"clean": 1.6, "robust": 1.7}},
            "blend": {
                **{name: dict.fromkeys(scores, 1.0) for name in ("weights", "center", "scale")},
                "intercept": 0.1,
                "threshold": 0.5,
            },
            "gate": {
                "intercept": dict.fromkeys(HEADS, 0.5),
                "features": [
                    {"statistic": name, "heads": heads, "center": 0, "scale": 1, "weights": dict.fromkeys(HEADS, 1.5)}
                    for name, heads in (("energy", ["clean"]), ("divergence", ["clean", "robust"]))
                ],
            },
        },
        "model": "model.onnx",
        "golden": "golden.npz",
        "provenance": {"packages": {"numpy": "2"}},
        "files": [
            {"path": name, "size": 0, "sha256": "0" * 64} for name in ("golden.npz", "model.onnx", "weights.bin")
        ],
    }


def manifests() -> list[bytes]:
    plain = manifest()
    single = plain | {"heads": ["original"], "router": {"default": "original"}, "golden": None}
    return [json.dumps(plain).encode(), json.dumps(single, indent=1).encode()]


def requests() -> list[bytes]:
    found = []
    pixels = bytes(range(SIDE * SIDE * 3))
    for size in (1, 3):
        message = service_pb2.ModelInferRequest(model_name="tiny", id="1")
        message.inputs.add(name="image", datatype="UINT8", shape=[size, SIDE, SIDE, 3])
        message.raw_input_contents.append(pixels * size)
        found.append(message.SerializeToString())
        message = service_pb2.ModelInferRequest(model_name="tiny", model_version="1")
        message.inputs.add(name="encoded_image", datatype="BYTES", shape=[size])
        message.raw_input_contents.append(pack_bytes(b"\xff\xd8\xff...") * size)
        message.parameters["router"].string_param = "clean"
        message.parameters["priority"].int64_param = 1
        message.parameters["timeout"].uint64_param = 1000
        message.outputs.add(name="label")
        found.append(message.SerializeToString())
    message = service_pb2.ModelInferRequest(model_name="tiny")
    message.inputs.add(name="image", datatype="UINT8", shape=[1, SIDE, SIDE, 3]).contents.uint_contents.extend(pixels)
    return [*found, message.SerializeToString()]


def elements() -> list[bytes]:
    return [b"\2" + pack_bytes(b"abc") + pack_bytes(b"") + pack_bytes(b"\xff" * 9), b"\0" + pack_bytes(b"x" * 300)]


def pictures() -> list[bytes]:
    return [picture.data for picture in evil_pictures().values() if 0 < len(picture.data) <= SMALL]


@lru_cache(maxsize=1)
def bundle_files() -> dict[str, bytes]:
    """The files of a bundle beside its manifest: a model whose weights lie outside it, and golden answers."""
    return {"model.onnx": models()[0], "golden.npz": golden_answers()[0], "weights.bin": bytes(64)}


def bundle_edits() -> list[bytes]:
    """Each kind of edit of each file, with the digests made true again behind it and without."""
    seal = bytes([9, 0, 0])
    return [bytes([kind, which, 100]) + tail for kind in range(9) for which in range(4) for tail in (b"", seal)]


def golden_answers() -> list[bytes]:
    k, c = len(HEADS), CLASSES
    arrays: dict[str, Any] = {
        "image": np.zeros((1, SIDE, SIDE, 3), np.uint8),
        "probabilities": np.full((1, k, c), 1 / c, np.float32),
        "predictive_entropy": np.zeros((1, k), np.float32),
        "mutual_information": np.zeros((1, k), np.float32),
        "divergence": np.zeros((1, k, k), np.float32),
        "energy": np.zeros((1, k), np.float32),
    }
    found = []
    for save in (np.savez, np.savez_compressed):
        file = io.BytesIO()
        save(file, **arrays)
        found.append(file.getvalue())
    return found


def models() -> list[bytes]:
    """ModelProto of one initializer with external data; the same in a node's attribute and in a function's."""

    def field(number: int, content: bytes) -> bytes:
        key, size = number << 3 | 2, len(content)
        return (
            (bytes([key]) if key < 128 else bytes([key & 127 | 128, key >> 7]))
            + (bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7]))
            + content
        )

    tensor = field(8, b"w") + field(13, field(1, b"location") + field(2, b"weights.bin"))
    node = field(1, field(5, field(5, tensor)))
    head = b"\x08\x0a"
    nested = field(1, field(5, field(6, field(5, tensor))))
    return [
        head + field(7, field(5, tensor)),
        head + field(7, node),
        head + field(25, field(7, node)),
        head + field(7, nested),
    ]


def token_files() -> list[bytes]:
    from hashlib import sha256

    line = sha256(TOKEN).hexdigest().encode() + b" alice admin"
    return [line, b"# holders\n\n" + line + b"\r\n" + b"AB" * 32 + b"\tbob\n"]


def settings() -> list[bytes]:
    return [Settings().yaml().encode(), b"bundles: [a, b]\nmax_batch: 8\nkernels: 'off'\nwatch: true\n", b""]
