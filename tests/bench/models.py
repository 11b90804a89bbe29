"""The graphs of the kernel benchmark: timm backbones with random weights, and heads in each of their forms."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from trivium.export.graph import IR_VERSION, OPSET, append_heads
from trivium.kernels import dropout_masks

BACKBONES = {
    "EfficientNet-Lite0": ("tf_efficientnet_lite0", 1280),
    "ResNet-50": ("resnet50", 2048),
    "ViT-B/16": ("vit_base_patch16_224", 768),
}
"""Title: name in timm and width of its features."""
HEADS = 3
KEEP = 0.5


def backbone(title: str, folder: Path) -> Path:
    """The ONNX file of a backbone, `image` [N, 3, 224, 224] -> `features` [N, D]; exported at the first call."""
    name, _ = BACKBONES[title]
    path = folder / f"{name}.onnx"
    if not path.exists():
        import timm
        import torch

        from trivium.export.onnx import quiet

        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False, num_classes=0).eval()
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                model,
                (torch.zeros(2, 3, 224, 224),),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("N")},),
                input_names=["image"],
                output_names=["features"],
                opset_version=OPSET,
                external_data=False,
            )
        assert program is not None
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        program.save(str(unfinished))
        unfinished.rename(path)
    return path


class Task(NamedTuple):
    """Random heads, and features that they classify the way a trained classifier does: sure of most."""

    features: NDArray[np.float32]
    """[B, D]."""
    weights: NDArray[np.float32]
    """[K, C, D]; every one a bfloat16, so that both ways of keeping them give the same answers."""
    bias: NDArray[np.float32]
    """[K, C]."""


@cache
def task(units: int, classes: int, batch: int) -> Task:
    """Classes as sparse prototypes, heads as noisy copies of them, scaled until the likeliest class has 0.8 or so."""
    rng = np.random.default_rng([units, classes])
    prototypes = np.maximum(rng.standard_normal((classes, units)), 0) * (rng.random((classes, units)) < 0.3)
    chosen = prototypes[rng.integers(0, classes, 32)] * rng.uniform(0.9, 1.1, (32, 1))
    features = np.maximum(chosen + 0.45 * rng.standard_normal((32, units)), 0)
    centred = prototypes - prototypes.mean(0)
    weights = np.stack([centred + 0.3 * rng.standard_normal((classes, units)) for _ in range(HEADS)])
    weights /= np.linalg.norm(weights, axis=-1, keepdims=True)
    scale, first_head = 1.0, features @ weights[0].T
    while softmax_top(first_head * scale) < 0.8:
        scale *= 1.1
    rounded = (weights * scale).astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    repeated = np.resize(features.astype(np.float32), (batch, units))
    return Task(repeated, rounded.view(np.float32), np.zeros((HEADS, classes), np.float32))


def softmax_top(logits: NDArray[np.float64]) -> float:
    """Mean probability of the likeliest class."""
    return float((1 / np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)).mean())


def plain_heads(heads: Task) -> bytes:
    """Three ordinary classifiers on shared features: a Gemm and a Softmax each."""
    weights, bias = heads.weights, heads.bias
    classes, units = weights.shape[1:]
    nodes, initializers, outputs = [], [], []
    for k in range(HEADS):
        initializers += [numpy_helper.from_array(weights[k], f"w{k}"), numpy_helper.from_array(bias[k], f"b{k}")]
        nodes.append(helper.make_node("Gemm", ["features", f"w{k}", f"b{k}"], [f"z{k}"], transB=1))
        nodes.append(helper.make_node("Softmax", [f"z{k}"], [f"p{k}"], axis=-1))
        outputs.append(helper.make_tensor_value_info(f"p{k}", TensorProto.FLOAT, ["N", classes]))
    graph = helper.make_graph(nodes, "plain", [_features(units)], outputs, initializers)
    return _model(graph).SerializeToString()


def mc_heads(heads: Task, passes: int) -> bytes:
    """MCHeads alone on its features: the fused operator where it is registered, the standard-ops body elsewhere."""
    units = heads.weights.shape[2]
    identity = helper.make_node("Identity", ["features"], ["head_input"])
    value = helper.make_tensor_value_info("head_input", TensorProto.FLOAT, ["N", units])
    model = _model(helper.make_graph([identity], "heads", [_features(units)], [value]))
    masks = dropout_masks(passes, units, KEEP, seed=0)
    return append_heads(
        model, "head_input", heads.weights, heads.bias, np.ones(HEADS, np.float32), masks, KEEP
    ).SerializeToString()


def _features(units: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", units])


def _model(graph: onnx.GraphProto) -> onnx.ModelProto:
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
