"""From a torch classifier to an ONNX model: uint8 pictures in; normalisation, backbone and MCHeads inside."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from importlib.metadata import version

import numpy as np
import onnx
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from trivium.kernels import dropout_masks
from trivium.runtime.bundle import Dropout, Preprocessing
from trivium.runtime.errors import ClientError
from trivium.train.models.mc import Heads

from .graph import IMAGE, IR_VERSION, OPSET, append_heads

FEATURES = "features"
PROTOBUF_LIMIT = 2**31 - 1
"""Bytes; protobuf can neither write nor parse a longer message."""


class ExportError(ClientError):
    """A model that cannot be compiled into a bundle; the text says why."""


class Backbone(nn.Module):
    """uint8 pictures [N, H, W, 3] -> the features that enter the heads, float32 [N, D] or [N, K, D]."""

    scale: Tensor
    shift: Tensor

    def __init__(self, classifier: Heads, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.classifier = classifier
        mean, std = (torch.tensor(v, dtype=torch.float64) for v in (preprocessing.mean, preprocessing.std))
        self.register_buffer("scale", (1 / (255 * std)).float().view(1, 3, 1, 1))
        self.register_buffer("shift", (-mean / std).float().view(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier.features(image.permute(0, 3, 1, 2).to(torch.float32) * self.scale + self.shift)


def masks_of(dropout: Dropout, units: int) -> NDArray[np.uint8]:
    """A bundle's dropout masks [T, D]: its settings alone decide them."""
    return dropout_masks(dropout.passes, units, 1 - dropout.rate, dropout.seed)


def export_backbone(classifier: Heads, preprocessing: Preprocessing) -> onnx.ModelProto:
    """Compile everything before the heads, batch free, same bytes for the same weights and package versions.

    Returns: a checked model, `image` uint8 [N, H, W, 3] -> `features` float32.
    Raises: ExportError where torch cannot trace the model or the result is too long for protobuf.
    """
    module = Backbone(classifier, preprocessing).eval()
    # Two pictures: torch.export would take a batch of one for a constant.
    example = torch.zeros(2, preprocessing.height, preprocessing.width, 3, dtype=torch.uint8)
    device = next(iter(module.buffers())).device
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                (example.to(device),),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("N")},),
                input_names=[IMAGE],
                output_names=[FEATURES],
                opset_version=OPSET,
                external_data=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise ExportError(f"torch cannot export this model to ONNX: {reason}") from error
    assert program is not None
    model = program.model_proto
    if model.ByteSize() > PROTOBUF_LIMIT:
        raise ExportError(f"the model takes {model.ByteSize()} bytes, an ONNX file holds {PROTOBUF_LIMIT} at most")
    strip(model)
    onnx.checker.check_model(model)
    return model


def add_heads(
    backbone: onnx.ModelProto, classifier: Heads, dropout: Dropout, temperature: ArrayLike
) -> onnx.ModelProto:
    """An exported backbone with the classifier's heads behind it; checked in full, shapes included."""
    weights, bias = (value.detach().cpu().numpy() for value in classifier.head_weights())
    masks = masks_of(dropout, weights.shape[2])
    model = append_heads(backbone, FEATURES, weights, bias, temperature, masks, 1 - dropout.rate)
    onnx.checker.check_model(model, full_check=True)
    return model


def strip(model: onnx.ModelProto) -> None:
    """Remove what says how the graph was made and not what it computes: stack traces, paths, scopes."""
    model.producer_name, model.producer_version, model.doc_string = "trivium", version("trivium"), ""
    model.ir_version = IR_VERSION
    del model.metadata_props[:]
    graph = model.graph
    graph.name, graph.doc_string = "trivium", ""
    del graph.metadata_props[:]
    del graph.value_info[:]
    for item in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        item.doc_string = ""
        del item.metadata_props[:]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back what torch's exporter prints about its own progress."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
