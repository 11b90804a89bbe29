"""What is asked: one picture as pixels and as JPEG, the bundles that answer, and the answer they must give."""

from __future__ import annotations

import io
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

HEADS = ("clean", "robust", "combined")


@dataclass(frozen=True)
class Picture:
    """One request's picture."""

    model: str
    pixels: NDArray[np.uint8]
    """[H, W, 3] in the model's size."""

    @property
    def jpeg(self) -> bytes:
        """A photograph's size: smooth content, quality 90, twice the model's size."""
        height, width = self.pixels.shape[:2]
        buffer = io.BytesIO()
        Image.fromarray(self.pixels).resize((2 * width, 2 * height), Image.Resampling.BICUBIC).save(
            buffer, "JPEG", quality=90
        )
        return buffer.getvalue()


def picture(bundle: Path) -> Picture:
    """Smooth random colours in the size of a bundle's model."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    height, width = manifest["preprocessing"]["height"], manifest["preprocessing"]["width"]
    coarse = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return Picture(manifest["name"], np.asarray(smooth))


def decoded(bundle: Path, asked: Picture) -> NDArray[np.uint8]:
    """What the runtime makes of the picture's JPEG."""
    from trivium.runtime.bundle import open_bundle
    from trivium.runtime.preprocess import decode

    return decode(asked.jpeg, open_bundle(bundle).manifest.preprocessing)


def expected(bundle: Path, pixels: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
    """Bare ONNX Runtime's answer."""
    from trivium.runtime.bundle import open_bundle
    from trivium.runtime.engine import Engine

    return dict(Engine(open_bundle(bundle)).run(pixels[None])._asdict())


def build(model: str, target: Path) -> None:
    """A bundle of random weights, three heads: EfficientNet-Lite0, 1000 classes; or the heads alone, 10 classes."""
    from trivium.export import pack
    from trivium.export.graph import append_heads
    from trivium.export.onnx import masks_of
    from trivium.runtime.bundle import Dropout, Manifest
    from trivium.runtime.staging import staging

    classes = 1000 if model == "lite0" else 10
    backbone, units, size = lite0() if model == "lite0" else tiny()
    rng = np.random.default_rng(0)
    dropout = Dropout(rate=0.5, passes=32, seed=0)
    weights, bias = rng.normal(0, 0.05, (3, classes, units)), np.zeros((3, classes))
    graph = append_heads(backbone, "features", weights, bias, np.ones(3), masks_of(dropout, units), 0.5)
    manifest = Manifest(
        name=model,
        classes=[f"class {i}" for i in range(classes)],
        heads=list(HEADS),
        preprocessing={"height": size, "width": size, "mean": (0.5,) * 3, "std": (0.5,) * 3},  # type: ignore[arg-type]
        dropout=dropout,
        router={"default": "combined"},  # type: ignore[arg-type]
        golden=pack.GOLDEN,
        files=pack.UNSEALED,
    )
    with staging(target) as root:
        pack.write(root, graph, manifest)


def lite0() -> tuple[Any, int, int]:
    import timm
    import torch
    from safetensors.torch import save_file

    from trivium.export.onnx import export_backbone
    from trivium.export.source import timm_source
    from trivium.runtime.bundle import Dropout

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "random.safetensors"
        save_file(timm.create_model("tf_efficientnet_lite0").state_dict(), file)
        dropout = Dropout(rate=0.5, passes=32, seed=0)
        source = timm_source(
            "tf_efficientnet_lite0", weights=file, labels=None, dropout=dropout, preprocessing={}, say=lambda _: None
        )
    return export_backbone(source.classifier, source.preprocessing), 1280, source.preprocessing.height


def tiny() -> tuple[Any, int, int]:
    from onnx import TensorProto, helper, numpy_helper

    scale = numpy_helper.from_array(np.full((), 1 / 255, np.float32), "scale")
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float", "scale"], ["scaled"]),
        helper.make_node("Flatten", ["scaled"], ["features"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 8, 8, 3])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", 192])],
        [scale],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), 192, 8
