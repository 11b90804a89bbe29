"""What a model's own record says of its training, and the packages that an evaluation runs on."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

from trivium.runtime.bundle import Manifest

PACKAGES = ("trivium", "torch", "timm", "numpy", "onnxruntime", "scikit-learn")


def trained_on(manifest: Manifest) -> list[str]:
    """Kinds of shifted views that the recipe trains on, where the model's record holds its recipe."""
    shifts = (manifest.provenance.get("recipe") or {}).get("shifts") or {}
    return [kind for kind in ("augmix", "pixmix", "structural") if shifts.get(kind)]


def training_seed(manifest: Manifest) -> int | None:
    """The recipe's, where the model's record holds it."""
    seed = (manifest.provenance.get("recipe") or {}).get("seed")
    return seed if isinstance(seed, int) else None


def costs(manifest: Manifest) -> dict[str, dict[str, float]]:
    """Training stage -> what it took, where the model's record says it."""
    found = manifest.training.get("costs") or {}
    return {stage: dict(cost) for stage, cost in found.items() if isinstance(cost, dict)}


def package_versions() -> dict[str, str]:
    """Versions of the packages that shape the numbers; those that are not installed are left out."""
    return {name: version(name) for name in PACKAGES if find_spec(name.replace("scikit-learn", "sklearn"))}
