"""int8: the backbone quantised with ranges measured on real pictures; the heads and their passes stay float32.

ONNX Runtime's static quantisation in the QDQ form: int8 weights per output channel, activations with entropy-calibrated
ranges. Everything up to and including the first weighted layer stays float32: normalisation and a layer of three input
channels cost more in int8 than they save, and what enters them decides the precision of all that follows.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from trivium.runtime.bundle import Preprocessing, Quantization
from trivium.runtime.errors import ConfigError, EngineError
from trivium.runtime.preprocess import SUFFIXES, read_picture
from trivium.train.data.pictures import Pictures

from .graph import IMAGE
from .onnx import strip

WEIGHTED = ("Conv", "ConvTranspose", "MatMul", "Gemm")
LEAST_PICTURES = 16
RANGE_PICTURES, HELD_OUT_PICTURES = 128, 512
"""Most pictures that ranges are measured on, and most that the drift is."""
STRIDE = 8
"""Pictures whose activations are held in memory at once while ranges are measured."""


@dataclass(frozen=True)
class RealPictures:
    """Pictures uint8 [N, H, W, 3] in the model's size; ranges and drift never see the same one."""

    ranges: NDArray[np.uint8]
    held_out: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    """Of the held-out ones, where they are known."""
    source: str


def from_data(pictures: Pictures) -> RealPictures:
    """Every other picture of a calibration split for the ranges, the others for the drift.

    Raises: ConfigError where there are too few.
    """
    chosen = spread(len(pictures))
    images = np.ascontiguousarray(pictures.batch(chosen).permute(0, 2, 3, 1).numpy())
    return halves(images, np.asarray(pictures.labels)[chosen], f"calibration split of {pictures.spec.kind}")


def from_folder(folder: Path, preprocessing: Preprocessing, classes: list[str]) -> RealPictures:
    """Every other picture below a folder for the ranges, the others for the drift.

    Labels are known where every picture lies in a folder that is named after its class.

    Raises: ConfigError where there are too few; InvalidPicture, which names the file.
    """
    if not folder.is_dir():
        raise ConfigError(f"--calibration {folder}: no such directory")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if len(files) < LEAST_PICTURES:
        raise ConfigError(f"--calibration {folder}: {len(files)} pictures, at least {LEAST_PICTURES} are needed")
    files = [files[i] for i in spread(len(files))]
    images = np.stack([read_picture(path, preprocessing) for path in files])
    place = {name: index for index, name in enumerate(classes)}
    labels = [place.get(path.parent.name, -1) for path in files]
    return halves(images, None if -1 in labels else np.array(labels, np.int64), f"pictures of folder {folder.name}")


def spread(count: int) -> NDArray[np.int64]:
    """Positions of the pictures to use of so many, evenly spread.

    Raises: ConfigError.
    """
    if count < LEAST_PICTURES:
        raise ConfigError(f"int8 needs at least {LEAST_PICTURES} pictures to measure ranges on, there are {count}")
    return np.linspace(0, count - 1, min(count, 2 * HELD_OUT_PICTURES)).astype(np.int64)


def halves(images: NDArray[np.uint8], labels: NDArray[np.int64] | None, source: str) -> RealPictures:
    ranges = images[::2][np.linspace(0, (len(images) + 1) // 2 - 1, min(len(images) // 2, RANGE_PICTURES)).astype(int)]
    return RealPictures(ranges, images[1::2], None if labels is None else labels[1::2], source)


class Reader:
    """Pictures one by one, in the form that ONNX Runtime's calibration asks for."""

    def __init__(self, images: NDArray[np.uint8]) -> None:
        self.images = images[: len(images) // STRIDE * STRIDE]
        self.at, self.end = 0, len(self.images)

    def __len__(self) -> int:
        return len(self.images)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.at, self.end = start_index, end_index

    def get_next(self) -> dict[str, Any] | None:
        if self.at >= self.end:
            return None
        self.at += 1
        return {IMAGE: self.images[self.at - 1 : self.at]}


def quantize_backbone(
    backbone: onnx.ModelProto, images: NDArray[np.uint8], activations: Literal["uint8", "int8"] = "uint8"
) -> tuple[onnx.ModelProto, list[str]]:
    """A backbone in int8.

    Args:
        backbone: uint8 pictures to features, float32.
        images: real pictures uint8 [N, H, W, 3], N >= 8, to measure ranges on.
        activations: "uint8" is what CPUs multiply fastest; TensorRT takes "int8" alone, with zero points of 0.

    Returns: the model, and the names of its weighted layers that stay float32.
    Raises: EngineError where ONNX Runtime cannot quantise it.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    symmetric = activations == "int8"
    with tempfile.TemporaryDirectory(prefix="trivium-") as folder, quiet():
        plain, prepared, quantised = (str(Path(folder) / f"{name}.onnx") for name in ("plain", "prepared", "int8"))
        try:
            onnx.save(backbone, plain)
            quant_pre_process(plain, prepared)
            nodes = onnx.load(prepared).graph.node
            weighted = [i for i, node in enumerate(nodes) if node.op_type in WEIGHTED]
            if len(weighted) < 2:
                raise EngineError("this model has no weighted layer behind its first, so there is nothing to quantise")
            first = weighted[0]
            quantize_static(
                prepared,
                quantised,
                Reader(images),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=[node.name for node in nodes[: first + 1]],
                calibrate_method=CalibrationMethod.Entropy,
                extra_options={
                    "ActivationSymmetric": symmetric,
                    "WeightSymmetric": True,
                    "CalibStridedMinMax": STRIDE,
                },
            )
            result = onnx.load(quantised)
        except (OSError, EngineError):
            raise
        except Exception as error:  # its quantiser raises whatever its parts raise
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise EngineError(f"ONNX Runtime cannot quantise this model: {reason}") from error
    strip(result)
    onnx.checker.check_model(result)
    return result, [nodes[first].name]


def record(pictures: RealPictures, activations: Literal["uint8", "int8"], layers: list[str]) -> Quantization:
    """What the manifest says of how a model was quantised, its drift apart."""
    return Quantization(
        activations=activations,
        method="entropy",
        pictures=len(Reader(pictures.ranges)),
        data=pictures.source,
        float_layers=layers,
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back what ONNX Runtime's quantiser prints and logs about its own progress."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
