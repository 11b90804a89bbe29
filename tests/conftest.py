"""Fixtures shared by all tests: a tiny but real bundle, made without torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from trivium.kernels import dropout_masks
from trivium.runtime.bundle import Manifest, read_manifest, seal
from trivium.runtime.engine import INPUT, Engine

SIZE, CLASSES, CHANNELS, PASSES, KEEP, SEED = 32, 10, 6, 32, 0.5, 7
UNITS = CHANNELS * (SIZE // 8) ** 2
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.25, 0.2)
HEADS = ("clean", "robust", "combined")


def tiny_model(heads: int, classes: int) -> Any:
    """uint8 [N, 32, 32, 3] -> a strided convolution, tanh -> MCHeads with seeded random weights."""
    onnx = pytest.importorskip("onnx", reason="the tiny bundle is made with onnx: pip install 'trivium[export]'")
    from onnx import TensorProto, helper, numpy_helper

    from trivium.export.graph import append_heads

    rng = np.random.default_rng(SEED)
    constants = {
        "mean": np.float32(255) * np.array(MEAN, np.float32),
        "std": np.float32(255) * np.array(STD, np.float32),
        "kernel": rng.normal(0, 0.2, (CHANNELS, 3, 8, 8)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Cast", [INPUT], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["float", "mean"], ["centered"]),
        helper.make_node("Div", ["centered", "std"], ["normalised"]),
        helper.make_node("Transpose", ["normalised"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "kernel"], ["maps"], strides=[8, 8]),
        helper.make_node("Tanh", ["maps"], ["active"]),
        helper.make_node("Flatten", ["active"], ["features"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(INPUT, TensorProto.UINT8, ["N", SIZE, SIZE, 3])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", UNITS])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    shared = rng.normal(0, 0.4, (1, classes, UNITS))
    weights = shared + rng.normal(0, 0.2, (heads, classes, UNITS))
    bias = rng.normal(0, 0.2, (heads, classes))
    masks = dropout_masks(PASSES, UNITS, KEEP, SEED)
    model = append_heads(model, "features", weights, bias, np.linspace(0.8, 1.2, heads), masks, KEEP)
    onnx.checker.check_model(model, full_check=True)
    return model


def tiny_manifest(heads: tuple[str, ...] = HEADS, classes: int = CLASSES, **changes: Any) -> Manifest:
    """The manifest of a tiny bundle; `changes` replace its top-level keys."""
    three = set(HEADS) <= set(heads)
    document: dict[str, Any] = {
        "name": "tiny",
        "classes": [f"class {i}" for i in range(classes)],
        "heads": list(heads),
        "preprocessing": {"height": SIZE, "width": SIZE, "resize": 36, "mean": MEAN, "std": STD},
        "dropout": {"rate": 1 - KEEP, "passes": PASSES, "seed": SEED},
        "router": {
            "default": "blend" if three else heads[0],
            "paper": {"divergence_threshold": 0.4, "entropy_scale": {"clean": 1.6, "robust": 1.7}} if three else None,
            "blend": {
                "weights": {"divergence": 1.0, "mutual_information": 0.5, "energy": 0.25},
                "center": {"divergence": -1.0, "mutual_information": 0.2, "energy": -10.5},
                "scale": {"divergence": 0.4, "mutual_information": 0.2, "energy": 1.5},
                "intercept": 0.1,
                "threshold": 0.5,
            }
            if three
            else None,
        },
        "golden": "golden.npz",
        "files": [{"path": path, "size": 0, "sha256": "0" * 64} for path in ("model.onnx", "golden.npz")],
    }
    return Manifest.model_validate(document | changes)


def tiny_guarantees(
    routers: tuple[str, ...] = (*HEADS, "mean", "min_entropy", "paper", "blend"), classes: int = CLASSES, **changes: Any
) -> dict[str, Any]:
    """Guarantees of a tiny bundle, made up, so that every router has thresholds of its own; `changes` replace keys."""
    confidences = ("max_probability", "predictive_entropy", "mutual_information")
    at_least = {"max_probability": 0.0, "predictive_entropy": -1.75, "mutual_information": -1.7}
    rows = {}
    for place, router in enumerate(routers):
        shift, confidence = 0.01 * place, confidences[place % 3]
        least: list[float | None] = [at_least[confidence] + 0.1 * step + shift for step in (4, 3, 2)]
        rows[router] = {
            "lac": [0.6 + shift, 0.8 + shift, 0.87 + shift, 0.9 + shift],
            "raps": [0.5 + shift, 0.7 + shift, 0.9 + shift, 1.1 + shift],
            "confidence": confidence,
            # a gap, as where a level failed that a lower one passed
            "least": [None, least[0], None, *least[1:]],
        }
    clean = routers[0]
    document: dict[str, Any] = {
        "mixture": {"clean": 0.5, "corrupted": 0.5},
        "pictures": 1000,
        "tuning_pictures": 333,
        "data": "drawn",
        "seed": SEED,
        "date": "2026-01-01",
        "coverages": [0.8, 0.9, 0.95, 0.99],
        "coverage": 0.9,
        "score": "lac",
        "raps_penalty": 0.05,
        "raps_free_ranks": 2,
        "delta": 0.05,
        "risks": [0.01, 0.05, 0.1, 0.2, 0.3],
        "max_risk": 0.2,
        "routers": rows,
        "shift": {
            "weights": {"divergence": 1.5, "mutual_information": 1.0, "energy": 0.5},
            "center": {"divergence": -1.0, "mutual_information": -1.0, "energy": -10.5},
            "scale": {"divergence": 0.5, "mutual_information": 0.5, "energy": 1.5},
            "intercept": -0.2,
        },
        "drift": {
            "pictures": 1000,
            "edges": {"predictive_entropy": [1.2, 1.6], "energy": [-11.0, -10.0]},
            "counts": {
                "predictive_entropy": [300, 400, 300],
                "energy": [300, 400, 300],
                "class_id": [1000 - 2 * (classes - 1), *[2] * (classes - 1)],
            },
            "head": clean,
        },
    }
    return document | changes


def build_bundle_at(root: Path, heads: tuple[str, ...] = HEADS, classes: int = CLASSES, **changes: Any) -> Path:
    root.mkdir(parents=True)
    (root / "model.onnx").write_bytes(tiny_model(len(heads), classes).SerializeToString(deterministic=True))
    (root / "golden.npz").write_bytes(b"")
    manifest = tiny_manifest(heads, classes, **changes)
    # sealed twice: the golden answers come from the sealed model
    engine = Engine(seal(root, manifest), kernels="off")
    image = pictures(4)
    np.savez(root / "golden.npz", image=image, **engine.run(image)._asdict())
    seal(root, manifest)
    return root


def pictures(count: int, size: int = SIZE, seed: int = SEED) -> NDArray[np.uint8]:
    """Seeded pictures, uint8 [count, size, size, 3]: blocks of colour with a little noise."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, 4, 4, 3)).repeat(size // 4, axis=1).repeat(size // 4, axis=2)
    return (blocks + rng.integers(-12, 13, blocks.shape)).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def build_bundle() -> Callable[..., Path]:
    """build_bundle(root, heads=..., classes=..., **manifest keys) makes a verified tiny bundle of one's own in root."""
    return build_bundle_at


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a real three-headed bundle, 32 x 32, 10 classes; not to be written to."""
    return build_bundle_at(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="session")
def single_head_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As tiny_bundle, with one head named original; not to be written to."""
    return build_bundle_at(tmp_path_factory.mktemp("bundles") / "single", heads=("original",))


@pytest.fixture(scope="session")
def guaranteed_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As tiny_bundle, with guarantees; not to be written to."""
    return build_bundle_at(tmp_path_factory.mktemp("bundles") / "guaranteed", guarantees=tiny_guarantees())


@pytest.fixture(scope="session")
def some_pictures() -> NDArray[np.uint8]:
    """Twelve pictures in the tiny bundles' size, uint8 [12, 32, 32, 3]."""
    return pictures(12)


@pytest.fixture(scope="session")
def slow_bundle(build_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle named slow, one picture of which takes tens of milliseconds: matrix products that change nothing."""
    onnx = pytest.importorskip("onnx")
    from onnx import helper, numpy_helper

    root = build_bundle(tmp_path_factory.mktemp("slow") / "slow", name="slow")
    model = onnx.load(root / "model.onnx")
    side, products = 512, 8
    start = next(i for i, node in enumerate(model.graph.node) if "features" in node.output)
    model.graph.node[start].output[0] = "plain_features"
    nodes = [
        helper.make_node("ReduceMean", ["float"], ["brightness"], keepdims=0),
        helper.make_node("Mul", ["brightness", "permutation"], ["product_0"]),
        *(helper.make_node("MatMul", [f"product_{i}", "permutation"], [f"product_{i + 1}"]) for i in range(products)),
        helper.make_node("ReduceMean", [f"product_{products}"], ["average"], keepdims=0),
        helper.make_node("Mul", ["average", "zero"], ["nothing"]),
        helper.make_node("Add", ["plain_features", "nothing"], ["features"]),
    ]
    for offset, node in enumerate(nodes):
        model.graph.node.insert(start + 1 + offset, node)
    permutation = np.eye(side, dtype=np.float32)[np.random.default_rng(1).permutation(side)]
    model.graph.initializer.append(numpy_helper.from_array(permutation, "permutation"))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((), np.float32), "zero"))
    onnx.save(model, root / "model.onnx")
    manifest = read_manifest(root)
    (root / "golden.npz").unlink()
    seal(root, manifest.model_copy(update={"golden": None}))
    return root
