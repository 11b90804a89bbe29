"""int8: what is quantised, what stays float, ranges and drift from different pictures, refusal by measurement."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from trivium.export import drift
from trivium.export.drift import DriftError
from trivium.export.pack import session
from trivium.export.quantize import from_folder, halves, quantize_backbone
from trivium.kernels import HeadStatistics
from trivium.runtime.bundle import Manifest, Preprocessing
from trivium.runtime.errors import ConfigError, EngineError, InvalidPicture

SIZE = 16
PREPROCESSING = Preprocessing(height=SIZE, width=SIZE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def backbone(convolutions: int) -> onnx.ModelProto:
    """uint8 [N, 16, 16, 3] -> convolutions with ReLU -> mean -> features [N, 8]."""
    rng = np.random.default_rng(1)
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], name="cast", to=TensorProto.FLOAT),
        helper.make_node("Div", ["float", "scale"], ["unit"], name="div"),
        helper.make_node("Transpose", ["unit"], ["x0"], name="transpose", perm=[0, 3, 1, 2]),
    ]
    constants = [numpy_helper.from_array(np.array(255, np.float32), "scale")]
    for i in range(convolutions):
        kernel = rng.normal(0, 0.3, (8, 8 if i else 3, 3, 3)).astype(np.float32)
        constants.append(numpy_helper.from_array(kernel, f"w{i}"))
        nodes.append(helper.make_node("Conv", [f"x{i}", f"w{i}"], [f"c{i}"], name=f"conv{i}"))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"x{i + 1}"], name=f"relu{i}"))
    nodes.append(helper.make_node("GlobalAveragePool", [f"x{convolutions}"], ["pooled"], name="pool"))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["features"], name="flatten"))
    graph = helper.make_graph(
        nodes,
        "backbone",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", SIZE, SIZE, 3])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", 8])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


@pytest.mark.parametrize(("activations", "kind"), [("uint8", TensorProto.UINT8), ("int8", TensorProto.INT8)])
def test_all_but_the_first_layer_is_int8_and_nearly_the_same(activations: str, kind: int) -> None:
    model = backbone(3)
    quantised, layers = quantize_backbone(model, pictures(16), activations)  # type: ignore[arg-type]
    assert layers == ["conv0"]
    constants = {value.name: value for value in quantised.graph.initializer}
    produced = {name: node for node in quantised.graph.node for name in node.output}
    for node in [node for node in quantised.graph.node if node.op_type == "Conv"]:
        sources = [produced[name].op_type if name in produced else "" for name in node.input[:2]]
        expected = ["Transpose", ""] if node.name == "conv0" else ["DequantizeLinear", "DequantizeLinear"]
        assert sources == expected
    points = [constants[node.input[2]] for node in quantised.graph.node if node.op_type == "QuantizeLinear"]
    assert points
    assert {point.data_type for point in points} == {kind}
    if activations == "int8":
        assert all((numpy_helper.to_array(point) == 0).all() for point in points), "TensorRT takes no zero points"
    images = pictures(20)[16:]
    a, b = (session(each).run(["features"], {"image": images})[0] for each in (model, quantised))
    assert np.abs(a - b).max() < 0.05 * np.abs(a).max()
    again, _ = quantize_backbone(model, pictures(16), activations)  # type: ignore[arg-type]
    assert again.SerializeToString(deterministic=True) == quantised.SerializeToString(deterministic=True)


def test_a_model_with_nothing_to_quantise_is_refused_in_one_line() -> None:
    with pytest.raises(EngineError, match="nothing to quantise"):
        quantize_backbone(backbone(1), pictures(8))


def test_pictures_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i, picture in enumerate(pictures(10)):
            Image.fromarray(picture).save(folder / name / f"{i}.png")
    found = from_folder(folder, PREPROCESSING, ["dog", "cat"])
    assert (len(found.ranges), len(found.held_out)) == (10, 10)
    assert found.labels is not None
    assert found.labels.tolist() == [1] * 5 + [0] * 5
    assert from_folder(folder, PREPROCESSING, ["dog", "bird"]).labels is None
    (folder / "dog" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(InvalidPicture, match=r"broken\.png"):
        from_folder(folder, PREPROCESSING, ["dog", "cat"])
    with pytest.raises(ConfigError, match="10 pictures, at least 16 are needed"):
        from_folder(folder / "cat", PREPROCESSING, [])
    with pytest.raises(ConfigError, match="no such directory"):
        from_folder(tmp_path / "absent", PREPROCESSING, [])


def test_ranges_and_drift_never_see_the_same_picture() -> None:
    images = pictures(31)
    found = halves(images, np.arange(31), "drawn")
    ranges = {picture.tobytes() for picture in found.ranges}
    assert not ranges & {picture.tobytes() for picture in found.held_out}
    assert found.labels is not None
    np.testing.assert_array_equal(images[found.labels], found.held_out)


def statistics(p: np.ndarray) -> HeadStatistics:
    """One head with these probabilities [N, C]."""
    n = len(p)
    entropy = -(p * np.log(p)).sum(1, keepdims=True)
    values = (p[:, None], entropy, 0 * entropy, np.zeros((n, 1, 1)), 0 * entropy)
    return HeadStatistics(*(value.astype(np.float32) for value in values))


MANIFEST = Manifest.model_validate(
    {
        "name": "m",
        "classes": ["a", "b"],
        "heads": ["original"],
        "preprocessing": {"height": 8, "width": 8, "mean": (0, 0, 0), "std": (1, 1, 1)},
        "dropout": {"rate": 0.5, "passes": 4, "seed": 0},
        "router": {"default": "original"},
        "files": [{"path": "model.onnx", "size": 0, "sha256": "0" * 64}],
    }
)


def test_drift_is_measured_and_refused_beyond_the_limit() -> None:
    before = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]])
    after = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.3, 0.7]])
    found = drift.compare(statistics(before), statistics(after), MANIFEST, np.array([0, 0, 1, 1]))
    assert (found.pictures, found.label_flips, found.head_flips) == (4, 0.25, 0.0)
    assert (found.accuracy_float32, found.accuracy, found.drop) == (1.0, 0.75, 25.0)
    assert found.kl_mean == pytest.approx((0.6 * np.log(1.5) + 0.4 * np.log(0.4 / 0.6)) / 4, rel=1e-5)
    assert found.entropy_change == pytest.approx(0, abs=1e-6)
    drift.check(found, 25.0)
    with pytest.raises(DriftError, match=r"top-1 accuracy drops by 25.00 points .* more than --max-drop 24") as refusal:
        drift.check(found, 24)
    assert refusal.value.exit_code == 3

    unlabelled = drift.compare(statistics(before), statistics(after), MANIFEST, None)
    assert unlabelled.drop == 25.0
    assert "accuracy" not in unlabelled.document()
    with pytest.raises(DriftError, match=r"labels that change: 25.00 %"):
        drift.check(unlabelled, 1)
