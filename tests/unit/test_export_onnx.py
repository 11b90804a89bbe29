"""From torch to ONNX: the same answers, the same bytes, and refusals in one line."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from trivium.export.onnx import ExportError, add_heads, export_backbone, masks_of
from trivium.export.pack import run
from trivium.export.parity import in_torch, with_features
from trivium.kernels import mc_heads_ref
from trivium.runtime.bundle import Dropout, Preprocessing

PREPROCESSING = Preprocessing(height=16, width=24, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
DROPOUT = Dropout(rate=0.25, passes=8, seed=5)
TEMPERATURE = [0.8, 1.0, 1.5]


class Tiny(nn.Module):
    """Convolution with a batch norm that has seen data, then three heads; own features where `own`."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.head_names: tuple[str, ...] = ("clean", "robust", "combined")
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
        self.weights = torch.randn(3, 10, 32, generator=generator)
        self.own = own
        for name, tensor in self.trunk.state_dict().items():
            if not name.endswith(("running_var", "num_batches_tracked")):
                tensor.normal_(generator=generator)
        self.eval()

    def features(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.trunk(x).flatten(1)
        return torch.stack([pooled, pooled.tanh(), -pooled], 1) if self.own else pooled

    def head_weights(self) -> tuple[Tensor, Tensor]:
        return self.weights, self.weights.mean(2)

    def original_logits(self, x: Tensor) -> Tensor:
        return torch.flatten(self.trunk(x), 1) @ self.weights[0].T


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (count, 16, 24, 3), dtype=np.uint8)


@pytest.mark.parametrize("own", [False, True])
def test_the_graph_answers_as_torch_and_as_the_definition(own: bool) -> None:
    model = Tiny(own)
    graph = add_heads(export_backbone(model, PREPROCESSING), model, DROPOUT, TEMPERATURE)
    images = pictures(5)
    features, found = with_features(graph, images)
    assert features.shape == ((5, 3, 32) if own else (5, 32))
    weights, bias = model.head_weights()
    expected = mc_heads_ref(features, weights, bias, TEMPERATURE, masks_of(DROPOUT, 32), 0.75)
    spoken = in_torch(model, PREPROCESSING, DROPOUT, images, TEMPERATURE)
    for a, b, c in zip(found, expected, spoken, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(a, c, rtol=1e-4, atol=1e-4)


def test_the_graph_is_reproducible_free_in_its_batch_and_says_nothing_of_its_making() -> None:
    model = Tiny(True)
    graphs = [add_heads(export_backbone(model, PREPROCESSING), model, DROPOUT, TEMPERATURE) for _ in range(2)]
    first, second = (graph.SerializeToString(deterministic=True) for graph in graphs)
    assert first == second
    assert b".py" not in first
    assert b"site-packages" not in first
    (image,) = graphs[0].graph.input
    assert image.name == "image"
    assert image.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [d.dim_param or d.dim_value for d in image.type.tensor_type.shape.dim] == ["N", 16, 24, 3]
    assert "BatchNormalization" not in {node.op_type for node in graphs[0].graph.node}
    assert [node.op_type for node in graphs[0].graph.node if node.domain == "ai.trivium"] == ["MCHeads"]
    images = pictures(3)
    for whole, alone in zip(run(graphs[0], images), run(graphs[0], images[1:2]), strict=True):
        np.testing.assert_array_equal(whole[1:2], alone)


def test_a_model_that_cannot_be_traced_is_one_line() -> None:
    class Branching(Tiny):
        def features(self, x: Tensor) -> Tensor:
            return super().features(x if float(x.sum()) > 0 else -x)

    with pytest.raises(ExportError, match="torch cannot export this model to ONNX") as caught:
        export_backbone(Branching(False), PREPROCESSING)
    assert "\n" not in str(caught.value)
