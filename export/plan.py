"""The plan of an export: what the command line asks for, said in full before anything is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from .pack import refuse_existing
from .source import Source

Target = Literal["onnx"]
Precision = Literal["fp32"]
TARGETS: tuple[Target, ...] = ("onnx",)
PRECISIONS: tuple[Precision, ...] = ("fp32",)


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
    """Used at most for temperatures and router."""
    force: bool = False
    """Replace what is there."""

    def check_places(self) -> None:
        """Raise ConfigError where something may not be written; cheap, before the source is loaded."""
        refuse_existing(self.bundle, self.force)

    def steps(self, source: Source) -> dict[str, str]:
        """What will be done, in this order."""
        name, dropout = self.name or source.name, source.dropout
        size = f"{source.preprocessing.height} x {source.preprocessing.width}"
        heads = ", ".join(source.classifier.head_names)
        result = {"backbone": f"compile {name} for uint8 pictures of {size}: {len(source.classes)} classes"}
        if source.pictures is not None:
            count = min(len(source.pictures), self.calibration_pictures)
            result["calibrate"] = f"calibrate temperatures and router on {count} pictures"
        result["heads"] = f"append heads {heads} with {dropout.passes} passes of dropout {dropout.rate:g}"
        result["parity"] = "compare the implementations"
        result["seal"] = f"write {self.bundle}, list every file with its SHA-256, repeat the golden answers"
        return result

    def document(self, source: Source) -> dict[str, Any]:
        """The plan for machines."""
        return {
            "source": {key: source.provenance.get(key) for key in ("source", "model", "weights_sha256")},
            "name": self.name or source.name,
            "version": self.version,
            "bundle": str(self.bundle),
            "passes": source.dropout.passes,
            "steps": list(self.steps(source).values()),
        }

    def table(self, source: Source) -> Table:
        """The plan for people."""
        result = Table(box=None, show_header=False, pad_edge=False)
        result.add_column(justify="right")
        result.add_column(overflow="fold")
        for number, text in enumerate(self.steps(source).values(), 1):
            result.add_row(f"{number}.", text)
        return result
