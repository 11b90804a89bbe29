"""The plan of an export: what the command line asks for, said in full before anything is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trivium.runtime.errors import ConfigError
from trivium.runtime.staging import refuse_existing
from trivium.runtime.tensorrt import library_version
from trivium.train.guarantees.calibrate import Settings, least_in_all

from .source import Source

Target = Literal["onnx", "triton", "tensorrt"]
Precision = Literal["fp32", "fp16", "int8"]
TARGETS: tuple[Target, ...] = ("onnx", "triton", "tensorrt")
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
GUARANTEE_PICTURES = 2000
"""That are kept from temperatures and router, if these are no more than half."""


@dataclass(frozen=True)
class Plan:
    """What to make of a source, and where."""

    bundle: Path
    name: str | None = None
    """Of the model; None: the source's."""
    version: str = "1"
    router: str | None = None
    """None leaves the choice to the calibration (where there is none: combined, or else the first head)."""
    calibration_pictures: int = 5000
    """Used at most for temperatures and router, and as many others for guarantees."""
    force: bool = False
    """Replace the bundle that is there."""
    targets: tuple[Target, ...] = ("onnx",)
    """The bundle itself is always made: all else is made from it."""
    precision: Precision = "fp32"
    """Of the backbone."""
    calibration: Path | None = None
    """Folder of real pictures for int8; None: the source's own."""
    max_drop: float = 1.0
    """Percentage points of top-1 that a lower precision may cost."""
    fold_router: bool = False
    """Answer by the default router in the graph too."""
    repository: Path | None = None
    """Of Triton; None: beside the bundle, its name with -triton."""

    @property
    def triton(self) -> Path:
        return self.repository or self.bundle.with_name(f"{self.bundle.name}-triton")

    @property
    def tensorrt(self) -> bool:
        return "tensorrt" in self.targets

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """What the artefacts are meant to run on."""
        return "cuda" if self.tensorrt or self.precision == "fp16" else "cpu"

    def check(self) -> None:
        """Refuse what cannot end well: cheap, before the source is loaded.

        Raises: ConfigError where something may not be written or read; EngineMismatch where TensorRT is missing.
        """
        refuse_existing(self.bundle, self.force)
        if self.calibration and not self.calibration.is_dir():
            raise ConfigError(f"--calibration {self.calibration}: no such directory")
        if self.tensorrt:
            library_version()

    def parts(self, source: Source) -> tuple[int, int]:
        """Calibration pictures for temperatures and router, and how many others are kept from these for guarantees: up
        to half of them; none where those would be too few."""
        if source.pictures is None:
            return 0, 0
        count, most = len(source.pictures), self.calibration_pictures
        kept = min(max(min(count // 2, GUARANTEE_PICTURES), count - most), most)
        if kept < least_in_all(Settings().coverages[-1]):
            kept = 0
        return min(count - kept, most), kept

    def steps(self, source: Source) -> dict[str, str]:
        """What will be done, in this order."""
        name, dropout = self.name or source.name, source.dropout
        size = f"{source.preprocessing.height} x {source.preprocessing.width}"
        heads = ", ".join(source.classifier.head_names)
        result = {"backbone": f"compile {name} for uint8 pictures of {size}: {len(source.classes)} classes"}
        fitted, kept = self.parts(source)
        if fitted:
            result["calibrate"] = f"calibrate temperatures and router on {fitted} pictures"
        result["heads"] = f"append heads {heads} with {dropout.passes} passes of dropout {dropout.rate:g}"
        result["parity"] = "compare the implementations"
        if self.precision == "fp16":
            result["precision"] = "put the backbone into float16 and measure what that changes"
        elif self.precision == "int8":
            where = self.calibration or "calibration"
            result["precision"] = f"quantise the backbone to int8 on {where} pictures and measure what that changes"
        if kept:
            result["guarantee"] = f"find on {kept} other pictures what may be promised of the answers"
        if self.fold_router:
            result["fold"] = "fold the default router into the graph and compare it with NumPy's"
        if self.tensorrt:
            result["tensorrt"] = f"check the graph's operators and build TensorRT's plan in {self.precision}"
        result["seal"] = f"write {self.bundle}, list every file with its SHA-256, repeat the golden answers"
        if "triton" in self.targets:
            result["triton"] = f"put the bundle into Triton's model repository {self.triton}"
        return result

    def document(self, source: Source) -> dict[str, Any]:
        """The plan for machines."""
        return {
            "source": {key: source.provenance.get(key) for key in ("source", "model", "weights_sha256")},
            "name": self.name or source.name,
            "version": self.version,
            "bundle": str(self.bundle),
            "targets": list(self.targets),
            "precision": self.precision,
            "fold_router": self.fold_router,
            "max_drop": self.max_drop,
            "repository": str(self.triton) if "triton" in self.targets else None,
            "passes": source.dropout.passes,
            "steps": list(self.steps(source).values()),
        }

    def text(self, source: Source) -> str:
        """The plan for people, a step a line."""
        return "\n".join(f"{number}. {text}" for number, text in enumerate(self.steps(source).values(), 1))
