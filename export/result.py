"""What an export made: its files with sizes and digests, and how near every one comes to what it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from trivium.runtime.bundle import MANIFEST, Bundle, File, digest

from .drift import Drift
from .parity import Difference, worst


@dataclass(frozen=True)
class Result:
    """A finished export."""

    bundle: Bundle
    parity: Sequence[Difference]
    drift: Drift | None = None
    """Of a lower precision."""
    repository: Sequence[Path] = ()
    """Files written into Triton's model repository."""

    def files(self) -> list[File]:
        """Everything that was written, the manifest included; paths as a user of this directory gives them."""
        root, manifest = self.bundle.path, self.bundle.path / MANIFEST
        listed = [file.model_copy(update={"path": str(root / file.path)}) for file in self.bundle.manifest.files]
        return [*listed, measured(manifest), *map(measured, self.repository)]

    def document(self) -> dict[str, Any]:
        """For machines."""
        manifest = self.bundle.manifest
        return {
            "name": manifest.name,
            "version": manifest.version,
            "bundle": str(self.bundle.path),
            "router": manifest.router.default,
            "artefacts": [file.model_dump() for file in self.files()],
            "parity": [row._asdict() for row in self.parity],
            "precision": manifest.precision,
            "drift": self.drift.document() if self.drift else None,
        }

    def nearest(self) -> str:
        """The row of the parity table that comes nearest to its limit, and what a lower precision costs."""
        precision = self.bundle.manifest.precision
        cost = f"; {precision}: top-1 drop {self.drift.drop:.2f}, KL {self.drift.kl_mean:.4f}" if self.drift else ""
        return f"{worst(self.parity)}{cost}"

    def table(self) -> Table:
        """For people."""
        result = Table(title="artefacts", title_justify="left", box=SIMPLE_HEAD)
        result.add_column("file", no_wrap=True)
        result.add_column("bytes", justify="right", no_wrap=True)
        result.add_column("SHA-256", no_wrap=True)
        result.add_column("parity: nearest to its limit", overflow="fold")
        model = self.bundle.model_path
        for file in self.files():
            result.add_row(
                file.path, f"{file.size:,}", file.sha256[:16], self.nearest() if Path(file.path) == model else ""
            )
        return result


def measured(path: Path) -> File:
    """A file with its size and digest."""
    return File(path=str(path), size=path.stat().st_size, sha256=digest(path))
