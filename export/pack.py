"""Writing a bundle: model, golden answers and manifest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from trivium.kernels import HeadStatistics
from trivium.runtime.bundle import Bundle, File, Manifest, Preprocessing, seal

from .graph import IMAGE, OUTPUTS

MODEL, GOLDEN = "model.onnx", "golden.npz"
UNSEALED = [File(path=path, size=0, sha256="0" * 64) for path in (MODEL, GOLDEN)]
"""What a manifest lists until `seal` measures the files."""
GOLDEN_PICTURES = 4


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """The model on one CPU thread with nothing registered: MCHeads runs as its standard-ops function."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto, images: NDArray[np.uint8]) -> HeadStatistics:
    """What the model says of uint8 pictures [N, H, W, 3], one at a time as a server asks it."""
    compiled = session(model)
    answers = [compiled.run(list(OUTPUTS), {IMAGE: images[i : i + 1]}) for i in range(len(images))]
    return HeadStatistics(*(np.concatenate(column) for column in zip(*answers, strict=True)))


def golden_pictures(preprocessing: Preprocessing, seed: int) -> NDArray[np.uint8]:
    """Smooth coloured blobs [4, H, W, 3]: drawn, not photographed, so that a bundle hands on nobody's pictures."""
    draw = np.random.default_rng([seed, 0x601D])
    height, width = preprocessing.height, preprocessing.width
    y, x = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None, :]
    total = np.zeros((GOLDEN_PICTURES, height, width, 3))
    for _ in range(12):
        cy, cx = draw.uniform(0, 1, (2, GOLDEN_PICTURES, 1, 1))
        radius = draw.uniform(0.05, 0.5, (GOLDEN_PICTURES, 1, 1))
        color = draw.uniform(-1, 1, (GOLDEN_PICTURES, 1, 1, 3))
        total += np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * radius**2))[..., None] * color
    return np.round(255 / (1 + np.exp(-2 * total))).astype(np.uint8)


def write(root: Path, model: onnx.ModelProto, manifest: Manifest) -> Bundle:
    """Fill an empty directory with model, golden answers and manifest, and read it back as a server would.

    Args:
        manifest: complete but for its files (UNSEALED in their place).

    Raises: BundleError where the bundle does not verify.
    """
    (root / MODEL).write_bytes(model.SerializeToString(deterministic=True))
    images = golden_pictures(manifest.preprocessing, manifest.dropout.seed)
    with (root / GOLDEN).open("wb") as file:
        np.savez(file, allow_pickle=False, image=images, **run(model, images)._asdict())
    return seal(root, manifest)
